"""Weights are gathered into large pages behind the back of those who use them."""

import re
import weakref
from pathlib import Path

import torch

import mixtura
from hf.decoders import own
from mixtura.hf.accelerate import acceleration
from mixtura.hf.large_pages import LargePages

MEGABYTE = 1 << 20


def large_bytes(tensor):
    """Of the mapping that a tensor lies in, as the system tells."""
    text = Path("/proc/self/smaps").read_text()
    for begin, end, rest in re.findall(r"^(\w+)-(\w+) (.*?)(?=^\w+-\w+ |\Z)", text, re.MULTILINE | re.DOTALL):
        if int(begin, 16) <= tensor.data_ptr() < int(end, 16):
            return 1024 * int(re.search(r"AnonHugePages:\s+(\d+)", rest).group(1))
    raise AssertionError("the tensor lies nowhere")


def test_values_stay_where_they_were():
    tensor = torch.randn(9 * MEGABYTE // 4)
    before, place = tensor.clone(), tensor.data_ptr()
    pages = LargePages([tensor, torch.ones(3), tensor]).wait()
    assert torch.equal(tensor, before)
    assert tensor.data_ptr() == place
    assert pages.size == tensor.nbytes + 12
    assert bool(pages.gathered) != bool(pages.refusal)
    if pages.gathered:
        assert 6 * MEGABYTE <= pages.gathered <= large_bytes(tensor)


def test_what_is_gathered_can_be_let_go():
    tensor = torch.ones(4 * MEGABYTE)
    gone = weakref.ref(tensor)
    pages = LargePages([tensor])
    del tensor
    pages.wait()
    assert gone() is None


def test_what_lies_in_a_file_stays_there(tmp_path):
    """That of transformers' checkpoints, mapped into memory."""
    torch.ones(4 * MEGABYTE).numpy().tofile(tmp_path / "weights")
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=4 * MEGABYTE)
    pages = LargePages([mapped]).wait()
    assert pages.gathered == 0
    assert pages.refusal
    assert mapped.sum() == 4 * MEGABYTE


def test_tensors_that_share_memory_are_gathered_once():
    whole = torch.ones(24 * MEGABYTE // 4)
    parts = [*whole.split(8 * MEGABYTE // 4)]
    pages = LargePages(parts).wait()
    assert pages.size == whole.nbytes
    assert 12 * MEGABYTE <= pages.gathered <= pages.size or pages.refusal
    assert whole.eq(1).all()


def test_accelerate_asks_for_them():
    model = mixtura.accelerate(own())
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert acceleration(model)["large_pages"] == {"gathered": 0, "size": size, "refusal": ""}


def test_who_measures_waits_for_them():
    model = own()
    model.resize_token_embeddings(16 * MEGABYTE // 256)  # of 64 float32 each
    pages = acceleration(mixtura.accelerate(model), wait=True)["large_pages"]
    assert pages["gathered"] >= 12 * MEGABYTE or pages["refusal"]


def test_tensors_can_be_exchanged_meanwhile():
    model = torch.nn.Embedding(16 * MEGABYTE // 256, 64)
    pages = LargePages(model.parameters())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.weight.dtype == torch.bfloat16
    pages.wait()
