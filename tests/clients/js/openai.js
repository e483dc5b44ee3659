// One case of test_javascript.py through the `openai` package: `node openai.js CASE` asks the server at OBOL_URL and
// prints what came back as JSON. What is right is decided there.

import OpenAI, { toFile } from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({
  baseURL: `${process.env.OBOL_URL}/v1`,
  apiKey: process.env.OBOL_KEY ?? "any",
  maxRetries: 0,
});
const hello = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { model: "default", temperature: 0, max_tokens: 24 };

const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city.",
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 20 }, unit: { enum: ["celsius", "fahrenheit"] } },
      required: ["city", "unit"],
      additionalProperties: false,
    },
  },
};
const named = { type: "function", function: { name: "get_weather" } };

/** Reads a stream to its end: its text and its last usage. */
async function whole(stream) {
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, usage };
}

/** What the promise was refused with. */
async function refusal(promise) {
  try {
    await promise;
  } catch (error) {
    return { name: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
  throw new Error("it was not refused");
}

const cases = {
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    return ids;
  },

  async chat() {
    const asked = client.chat.completions.create({ ...greedy, messages: hello });
    const { data, response, request_id } = await asked.withResponse();
    return { answer: data, cost: response.headers.get("x-obol-cost"), request_id };
  },

  async stream() {
    const asked = { ...greedy, messages: hello, stream: true, stream_options: { include_usage: true } };
    const plain = await whole(await client.chat.completions.create(asked));
    const helper = client.chat.completions.stream(asked);
    let deltas = 0;
    helper.on("content", () => (deltas += 1));
    return { ...plain, helper: await helper.finalContent(), deltas };
  },

  async completion() {
    const answer = await client.completions.create({ ...greedy, prompt: "Once upon a time" });
    const streamed = await client.completions.create({ ...greedy, prompt: "Once upon a time", stream: true });
    let text = "";
    for await (const chunk of streamed) text += chunk.choices[0]?.text ?? "";
    return { answer, streamed: text };
  },

  async tools() {
    const asked = { ...greedy, max_tokens: 200, messages: hello, tools: [weather], tool_choice: named };
    const answer = await client.chat.completions.create(asked);
    const helper = client.chat.completions.stream(asked);
    const streamed = await helper.finalMessage();
    return { answer, streamed };
  },

  async runner() {
    const called = [];
    const tool = structuredClone(weather);
    tool.function.parse = JSON.parse;
    tool.function.function = (read) => {
      called.push(read);
      return "18 degrees";
    };
    const runner = client.chat.completions.runTools({
      ...greedy,
      max_tokens: 200,
      messages: hello,
      tools: [tool],
      tool_choice: named,
    });
    await runner.done();
    const gave = runner.messages.at(-1);
    const said = await client.chat.completions.create({ ...greedy, messages: runner.messages, tools: [weather] });
    return { called, gave, said };
  },

  async structured() {
    const person = z.strictObject({
      name: z.string().max(20),
      age: z.int().min(0).max(120),
      mood: z.enum(["good", "bad"]),
    });
    const messages = [{ role: "user", content: "Describe a person who lives in Paris." }];
    const form = zodResponseFormat(person, "person");
    const asked = { ...greedy, max_tokens: 200, messages, response_format: form };
    const answer = await client.chat.completions.parse(asked);
    const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
    return { parsed: answer.choices[0].message.parsed, streamed: streamed.choices[0].message.parsed };
  },

  async embeddings() {
    const asked = { model: "default", input: ["The cat sits on the mat.", "x"] };
    const { data, response } = await client.embeddings.create(asked).withResponse();
    const floats = await client.embeddings.create({ ...asked, encoding_format: "float" });
    const vectors = (answer) => answer.data.map((item) => item.embedding);
    return { own: vectors(data), floats: vectors(floats), usage: data.usage, cost: response.headers.get("x-obol-cost") };
  },

  async responses() {
    const asked = { model: "default", temperature: 0, max_output_tokens: 24, input: hello[0].content };
    const first = await client.responses.create(asked);
    const events = [];
    for await (const event of await client.responses.create({ ...asked, stream: true })) events.push(event);
    const helper = await client.responses.stream(asked).finalResponse();
    const second = await client.responses.create({ ...asked, input: "And of Italy?", previous_response_id: first.id });
    return { first, text: first.output_text, events, helper: helper.output_text, second };
  },

  async batch() {
    const body = { ...greedy, messages: hello };
    const asked = [body, { ...body, temperature: -1 }].map((body, number) =>
      JSON.stringify({ custom_id: `line-${number}`, method: "POST", url: "/v1/chat/completions", body }),
    );
    const lines = await toFile(Buffer.from(asked.join("\n")), "lines.jsonl");
    const file = await client.files.create({ file: lines, purpose: "batch" });
    const made = { input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" };
    let batch = await client.batches.create(made);
    while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
      await new Promise((wake) => setTimeout(wake, 100));
      batch = await client.batches.retrieve(batch.id);
    }
    const read = async (id) => {
      const text = await (await client.files.content(id)).text();
      return text.trim().split("\n").map((line) => JSON.parse(line));
    };
    const [outputs, errors] = [await read(batch.output_file_id), await read(batch.error_file_id)];
    const deleted = await client.files.delete(file.id);
    return { batch, outputs, errors, deleted: deleted.deleted };
  },

  async abort() {
    const asked = { ...greedy, max_tokens: 1500, messages: hello, stream: true, ignore_eos: true };
    const { data: stream, request_id } = await client.chat.completions.create(asked).withResponse();
    let seen = 0;
    for await (const chunk of stream) {
      seen += chunk.choices.length;
      if (seen === 4) stream.controller.abort();
    }
    return { seen, request_id };
  },

  async errors() {
    const create = (more) => client.chat.completions.create({ ...greedy, messages: hello, ...more });
    return {
      bad: await refusal(create({ temperature: -1 })),
      missing: await refusal(create({ model: "no-such-model" })),
    };
  },
};

const [name] = process.argv.slice(2);
console.log(JSON.stringify(await cases[name]()));
