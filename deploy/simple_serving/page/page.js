// The page at "/": labels the lines of a text field by POST predict. Texts and labels become text nodes only, never HTML.
"use strict";

const PART = 32; // texts of a request: answers appear while the rest is computed
const WORDS = {
  zh: {
    title: "文本分类", other: "English", texts: "文本，每行一条", token: "令牌", send: "分类", keys: "Ctrl + Enter",
    placeholder: "头疼怎么办\n拔牙多少钱", working: (done, all) => `已完成 ${done} / ${all} 条……`, done: (all) => `共 ${all} 条`,
    none: "没有文本：请在上面的框里粘贴，每行一条", unreachable: "连不上服务，请稍后再试",
    line: (number) => `第 ${number} 条文本`, known: (share) => `属于已知标签的概率 ${share}`, nearest: "最近的文本",
    local: "文本只发给本服务，日志里没有文本。", docs: "接口说明（程序员）",
  },
  en: {
    title: "Text classification", other: "中文", texts: "Texts, one per line", token: "Token", send: "Classify", keys: "Ctrl + Enter",
    placeholder: "头疼怎么办\n拔牙多少钱", working: (done, all) => `${done} of ${all} texts done ...`, done: (all) => `Texts: ${all}`,
    none: "No text: paste some above, one per line", unreachable: "The server cannot be reached, try again later",
    line: (number) => `Text ${number}`, known: (share) => `Probability of a known label ${share}`, nearest: "Nearest texts",
    local: "Texts are sent to this server only, whose log does not hold them.", docs: "For programmers: the interface",
  },
};

const settings = JSON.parse(document.body.dataset.settings);
const find = (id) => document.getElementById(id);
let words = WORDS[navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"];

function make(name, className, text) {
  const element = document.createElement(name);
  element.className = className;
  element.textContent = text ?? "";
  return element;
}

function percent(share) {
  return `${(share * 100).toFixed(1)} %`;
}

function showWords() {
  document.documentElement.lang = words === WORDS.zh ? "zh-CN" : "en";
  document.title = words.title;
  for (const element of document.querySelectorAll("[data-words]")) {
    element.textContent = words[element.dataset.words];
  }
  find("language").textContent = words.other;
  find("texts").placeholder = words.placeholder;
}

function say(message, isWrong = false) {
  find("state").textContent = message;
  find("state").classList.toggle("wrong", isWrong);
}

// A card: the text, a bar for each of its labels, and what an index gives besides.
function showAnswer(text, answer) {
  const card = make("article", "answer");
  card.append(make("div", "text", text));
  const labels = make("div", "labels");
  answer.top_k.forEach((top, place) => {
    const bar = make("div", "bar");
    const share = make("div", "");
    share.style.width = `${top.confidence * 100}%`;
    bar.append(share);
    labels.append(make("span", place ? "label" : "label best", top.label), bar, make("span", "number", percent(top.confidence)));
  });
  card.append(labels);
  if (answer.known !== undefined) {
    card.append(make("p", "known", words.known(percent(answer.known))));
  }
  if (answer.nearest?.length) {
    const list = make("ol", "nearest");
    for (const near of answer.nearest) {
      list.append(make("li", "", `${near.text} · ${near.label} · ${near.similarity.toFixed(3)}`));
    }
    card.append(make("small", "", words.nearest), list);
  }
  find("answers").append(card);
}

// What a refusal says, in lines; its fields data.text.N are counted from the first text of the request.
function explain(errors, first) {
  return errors.map(({ field, message }) => {
    const place = /^data\.text\.(\d+)$/.exec(field);
    const where = place ? words.line(first + Number(place[1]) + 1) : field;
    return where ? `${where}: ${message}` : message;
  }).join("\n");
}

async function predict(texts, first) {
  const headers = { "Content-Type": "application/json" };
  if (settings.needs_token) {
    headers.Authorization = `Bearer ${find("token").value.trim()}`;
  }
  const response = await fetch("predict", {
    method: "POST", headers, body: JSON.stringify({ data: { text: texts }, parameters: settings.parameters }),
  });
  if (response.ok) {
    return (await response.json()).result;
  }
  const isJson = (response.headers.get("Content-Type") ?? "").includes("json");
  throw new Error(isJson ? explain((await response.json()).errors, first) : await response.text());
}

async function classify() {
  const texts = find("texts").value.split("\n").filter((line) => line.trim());
  find("answers").replaceChildren();
  if (!texts.length) {
    say(words.none, true);
    return;
  }
  const part = Math.min(PART, settings.max_texts);
  find("send").disabled = true;
  try {
    for (let first = 0; first < texts.length; first += part) {
      say(words.working(first, texts.length));
      const some = texts.slice(first, first + part);
      const answers = await predict(some, first);
      answers.forEach((answer, place) => showAnswer(some[place], answer));
    }
    say(words.done(texts.length));
  } catch (error) {
    say(error instanceof TypeError ? words.unreachable : error.message, true);
  } finally {
    find("send").disabled = false;
  }
}

find("token-row").hidden = !settings.needs_token;
find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  classify();
});
find("texts").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    find("form").requestSubmit();
  }
});
find("language").addEventListener("click", () => {
  words = words === WORDS.zh ? WORDS.en : WORDS.zh;
  showWords();
});
showWords();
if (location.hash) { // of a link such as /#头疼怎么办
  try {
    find("texts").value = decodeURIComponent(location.hash.slice(1));
  } catch { // a link written by hand, with a % that is one
    find("texts").value = location.hash.slice(1);
  }
  if (!settings.needs_token) {
    classify();
  }
}
