// The openai package for JavaScript. Prints what use_openai.py prints.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const asked = JSON.parse(readFileSync(new URL("asked.json", import.meta.url)));
const { EXPERTMESH_HTTP: http, EXPERTMESH_MODEL: model, EXPERTMESH_KEY: key } = process.env;
const { prompt, messages, stop, n } = asked;
const greedy = { model, max_tokens: asked.max_tokens, temperature: 0 };
const seeded = { ...greedy, temperature: asked.temperature, seed: asked.seed };

const client = (apiKey) => new OpenAI({ baseURL: `${http}/v1`, apiKey, maxRetries: 0 });
const api = client(key ?? "none");

async function listed() {
  const models = [];
  for await (const found of api.models.list()) models.push(found.id);
  return { models };
}

async function completions() {
  const ask = async (fields) => (await api.completions.create({ prompt, ...fields })).choices;
  const [whole] = await ask({ ...greedy, logprobs: 1 });
  return {
    completion: whole.text,
    completion_tokens: whole.logprobs.tokens,
    completion_choices: (await ask({ ...seeded, n })).map((choice) => choice.text),
    completion_stopped: (await ask({ ...greedy, stop }))[0].text,
    completion_seeded: (await ask(seeded))[0].text,
  };
}

async function chats() {
  const ask = async (fields) => (await api.chat.completions.create({ messages, ...fields })).choices;
  const [whole] = await ask({ ...greedy, logprobs: true, top_logprobs: 2 });
  const [stopped] = await ask({ ...greedy, stop });
  return {
    chat: whole.message.content,
    chat_tokens: whole.logprobs.content.map((token) => token.token),
    chat_logprobs: whole.logprobs.content.map((token) => token.logprob),
    choices: (await ask({ ...seeded, n })).map((choice) => choice.message.content),
    stopped: stopped.message.content,
    stop_reason: stopped.finish_reason,
    seeded: (await ask(seeded))[0].message.content,
  };
}

async function streamed() {
  let text = "";
  let usage = null;
  const options = { ...greedy, messages, stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await api.chat.completions.create(options)) {
    text += chunk.choices.map((choice) => choice.delta.content ?? "").join("");
    usage = chunk.usage ?? usage;
  }
  return { streamed: text, streamed_usage: [usage.prompt_tokens, usage.completion_tokens] };
}

// The names of an error's class and its bases; none where nothing was refused.
async function refused(named, content, apiKey) {
  try {
    const body = { model: named, messages: [{ role: "user", content }], max_tokens: 1 };
    await client(apiKey).chat.completions.create(body);
    return [];
  } catch (error) {
    const names = [];
    for (let kind = error.constructor; kind?.name; kind = Object.getPrototypeOf(kind)) names.push(kind.name);
    return names;
  }
}

async function refusals() {
  const found = {
    unknown_model: await refused("no-such-model", prompt, key ?? "none"),
    too_long: await refused(model, "word ".repeat(asked.long_words), key ?? "none"),
  };
  if (key) found.wrong_key = await refused(model, prompt, "this-key-was-never-given-out");
  return { refused: found };
}

const parts = [listed, completions, chats, streamed, refusals];
const answers = {};
for (const part of parts) Object.assign(answers, await part());
console.log(JSON.stringify(answers));
