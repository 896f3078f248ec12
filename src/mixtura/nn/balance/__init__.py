"""What keeps experts equally busy and routers stable: losses of one layer's routing. One method a file."""
