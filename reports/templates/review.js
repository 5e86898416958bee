// A person's word on a trial, sent to the server that serves this page.

const REVIEW_DONE = { pick: "Picked", reject: "Rejected", note: "Note kept" };

async function send(trial, action, note) {
  let response;
  try {
    response = await fetch(data.review.url, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Nightpress-Token": data.review.token },
      body: JSON.stringify({ trial: trial.trial, digest: trial.digest, action, note }),
    });
  } catch {
    throw new Error("The server does not answer: is nightpress review still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error || `The server refused it (status ${response.status}).`);
  return answer;
}

function reviewControls(trial) {
  if (trial.state !== "COMPLETE") return null;
  const note = el("input", { type: "text", id: "review-note", placeholder: "why", maxlength: 2000 });
  const said = el("p", { class: "muted", role: "status", id: "review-status" });
  const press = async (action) => {
    buttons.forEach((button) => {
      button.disabled = true;
    });
    said.textContent = "Sending…";
    try {
      const entry = await send(trial, action, note.value);
      data.reviews.push(entry);
      if (selected === trial.trial) select(trial.trial);
      document.getElementById("review-status").textContent = `${REVIEW_DONE[action]}.`;
    } catch (error) {
      said.textContent = error.message;
    } finally {
      buttons.forEach((button) => {
        button.disabled = false;
      });
    }
  };
  const buttons = [
    ["pick", "Pick"],
    ["reject", "Reject"],
    ["note", "Keep note"],
  ].map(([action, words]) => {
    const button = el("button", { type: "button", "data-review": action }, words);
    button.addEventListener("click", () => press(action));
    return button;
  });
  const who = data.review.who ? `Kept in the run's record as the word of ${data.review.who}.` : null;
  return el(
    "section",
    { class: "review" },
    el("h4", {}, "Your word"),
    el("div", { class: "command" }, el("label", { for: "review-note" }, "Note"), note, ...buttons),
    who ? el("p", { class: "muted" }, who) : null,
    said,
  );
}
