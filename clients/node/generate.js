// Streams the greedy continuation of one prompt from a Duet server to standard output; what is known about it goes to
// standard error. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const USAGE = "usage: generate [--address HOST:PORT] [--max-tokens N] [--chat] PROMPT";
const MAX_ATTEMPTS = 5;
const UINT32_MAX = 2 ** 32 - 1;
const RETRIED = [grpc.status.UNAVAILABLE, grpc.status.RESOURCE_EXHAUSTED];

const path = (relative) => fileURLToPath(new URL(relative, import.meta.url));
const protos = protoLoader.loadSync(["duet/inference/v1/inference.proto", "google/rpc/errors.proto"], {
  includeDirs: [path("../../protos"), path("../protos")],
  keepCase: true, // names as in the protocol
  enums: String,
  longs: String,
  defaults: true,
  oneofs: true, // response.event names the event that is set
  json: true, // a detail of a status is unpacked, and has "@type"
});
const { InferenceService } = grpc.loadPackageDefinition(protos).duet.inference.v1;

/** The command line as an object, or undefined where it is wrong. */
function parseCommandLine(argv) {
  const options = {
    address: { type: "string", default: "127.0.0.1:50051" },
    "max-tokens": { type: "string", default: "64" },
    chat: { type: "boolean", default: false },
  };
  try {
    const { values, positionals } = parseArgs({ args: argv, options, allowPositionals: true });
    const maxTokens = /^\d+$/.test(values["max-tokens"]) ? Number(values["max-tokens"]) : NaN;
    if (positionals.length !== 1 || !(maxTokens <= UINT32_MAX)) return undefined;
    return { address: values.address, maxTokens, chat: values.chat, prompt: positionals[0] };
  } catch {
    return undefined;
  }
}

function buildRequest({ prompt, chat, maxTokens }) {
  return {
    ...(chat ? { chat: { messages: [{ role: "user", content: prompt }] } } : { text: prompt }),
    sampling: { temperature: 0 },
    stop: { max_tokens: maxTokens },
  };
}

/** Prints one stream's events as they come. Throws the call's status, with `printed` set where text was shown. */
async function printStream(client, request, interrupted) {
  const call = client.Generate(request);
  const cancel = () => call.cancel();
  interrupted.addEventListener("abort", cancel);
  let printed = false;
  let finished;
  try {
    for await (const response of call) {
      if (response.event === "started") {
        console.error(`request ${response.started.request_id}`);
      } else if (response.event === "delta") {
        process.stdout.write(response.delta.text);
        printed = true;
      } else if (response.event === "finished") {
        finished = response.finished;
      }
    }
    if (!finished) throw Object.assign(new Error("the stream was cut"), { code: grpc.status.DATA_LOSS });
  } catch (error) {
    throw Object.assign(error, { printed });
  } finally {
    interrupted.removeEventListener("abort", cancel);
    if (printed) process.stdout.write("\n");
  }
  const { prompt_tokens, cached_tokens, output_tokens } = finished.usage;
  console.error(
    `finished: ${finished.reason}, ${prompt_tokens} prompt tokens (${cached_tokens} cached), ` +
      `${output_tokens} output tokens`,
  );
}

/** A detail of a failed call, or undefined where the server sent none of this type. */
function detail(error, type) {
  const [packed] = error.metadata?.get("grpc-status-details-bin") ?? [];
  const status = packed ? protos["google.rpc.Status"].deserialize(packed) : { details: [] };
  return status.details.find((one) => one["@type"] === `type.googleapis.com/google.rpc.${type}`);
}

/** Milliseconds after which the server asks to be called again, or undefined where it does not. */
function retryDelay(error) {
  const delay = RETRIED.includes(error.code) ? detail(error, "RetryInfo")?.retry_delay : undefined;
  return delay && Number(delay.seconds) * 1000 + delay.nanos / 1e6;
}

function describe(error) {
  const field = detail(error, "BadRequest")?.field_violations[0]?.field;
  return `${grpc.status[error.code]}: ${error.details ?? error.message}${field ? ` [field ${field}]` : ""}`;
}

/** Streams until it is done or fails for good; returns the exit status. */
async function generate(client, request, interrupted) {
  for (let attempt = 1; ; attempt++) {
    try {
      await printStream(client, request, interrupted);
      return 0;
    } catch (error) {
      if (interrupted.aborted) return 130;
      if (error.code === undefined) throw error; // not a call's status but a mistake of this program
      const delay = retryDelay(error);
      if (error.printed || delay === undefined || attempt === MAX_ATTEMPTS) {
        console.error(`error: ${describe(error)}`);
        return 1;
      }
      console.error(`${describe(error)}; trying again in ${delay} ms`);
      await sleep(delay, undefined, { signal: interrupted }).catch(() => {});
      if (interrupted.aborted) return 130;
    }
  }
}

async function main(argv) {
  const args = parseCommandLine(argv);
  if (!args) {
    console.error(USAGE);
    return 2;
  }
  const interrupt = new AbortController();
  process.once("SIGINT", () => interrupt.abort());
  // A proxy meant for web traffic must not swallow calls to the loopback.
  const options = { "grpc.enable_http_proxy": 0 };
  const client = new InferenceService(args.address, grpc.credentials.createInsecure(), options);
  try {
    return await generate(client, buildRequest(args), interrupt.signal);
  } finally {
    client.close();
  }
}

process.stdout.on("error", () => process.exit(1)); // nobody reads the output
process.exitCode = await main(process.argv.slice(2));
