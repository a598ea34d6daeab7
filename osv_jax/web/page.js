// The videos of a result in step: the first one leads, the others follow it.
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
let dragging = false;

const films = () => [...element.querySelectorAll("video")];
const find = (name) => element.querySelector(name);

function setPlaying(playing) {
  for (const film of films()) {
    if (playing) film.play().catch(() => {});
    else film.pause();
  }
  if (find(".play")) find(".play").textContent = playing ? "Pause" : "Play";
}

function moveTo(seconds) {
  for (const film of films()) film.currentTime = Math.min(seconds, film.duration || seconds);
}

function isPlaying() {
  return find(".play")?.textContent === "Pause";
}

function tick() {
  const [leader, ...others] = films();
  if (leader && leader.duration) {
    if (isPlaying() && leader.ended) {
      moveTo(0);
      setPlaying(true);
    }
    for (const film of others) {
      if (Math.abs(film.currentTime - leader.currentTime) > 0.08 && !film.seeking) film.currentTime = leader.currentTime;
    }
    if (!dragging) find(".scrub").value = leader.currentTime / leader.duration;
    find(".time").textContent = leader.currentTime.toFixed(1) + " / " + leader.duration.toFixed(1) + " s";
  }
  requestAnimationFrame(tick);
}

element.addEventListener("click", (event) => {
  if (event.target.matches(".play, video")) setPlaying(!isPlaying());
});
element.addEventListener("input", (event) => {
  if (!event.target.matches(".scrub")) return;
  dragging = true;
  moveTo(Number(event.target.value) * (films()[0]?.duration || 0));
});
element.addEventListener("change", () => { dragging = false; });
watch("value", () => setPlaying(!still));
requestAnimationFrame(tick);
