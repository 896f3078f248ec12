document.documentElement.classList.add("scripted");
const routes = JSON.parse(document.getElementById("routes").textContent);
const layer = document.getElementById("layer"), detail = document.getElementById("detail");
let only = null, chosen = null;
const describe = (p, i) => routes.passages[p].experts[layer.value][i]
  .map((e, k) => e === null ? null : `${e} (${routes.passages[p].weights[layer.value][i][k].toFixed(2)})`)
  .filter(Boolean).join(", ") || "none";
function paint() {
  for (const token of document.querySelectorAll(".passage .t")) {
    const [p, i] = token.dataset.at.split(" ");
    const e = routes.passages[p].experts[layer.value][i][0];
    token.className = e === null ? "t" : `t x${e % 8} u${Math.floor(e / 8) % 4}`;
    token.classList.toggle("dim", only !== null && e !== only);
    token.classList.toggle("chosen", token === chosen);
    token.dataset.e = e === null ? "" : e;
    token.title = `experts ${describe(p, i)}`;
  }
}
layer.addEventListener("change", paint);
document.querySelector(".passages").addEventListener("click", ({target}) => {
  if (!target.matches(".t")) return;
  chosen = target;
  paint();
  const name = layer.selectedOptions[0].textContent;
  detail.textContent = `“${target.firstChild?.textContent ?? ""}”, layer ${name}: experts ${describe(...target.dataset.at.split(" "))}`;
});
for (const chip of document.querySelectorAll(".legend button")) chip.addEventListener("click", () => {
  only = only === +chip.value ? null : +chip.value;
  for (const other of document.querySelectorAll(".legend button")) other.setAttribute("aria-pressed", only === +other.value);
  paint();
});
