// llama.cpp by way of node-llama-cpp: plain decoding, and drafts that copy the prompt. The protocol
// is that of serve.py. The folder with node_modules is the only argument.

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const installed = join(process.argv[2], "node_modules", "node-llama-cpp");
const library = await import(pathToFileURL(join(installed, "dist", "index.js")));
const { version } = JSON.parse(await readFile(join(installed, "package.json"), "utf8"));

let sequences, stopTokens;

async function load(setup) {
    const llama = await library.getLlama({
        gpu: false,
        build: "never",
        logLevel: library.LlamaLogLevel.error,
    });
    const threads = setup.threads;
    const model = await llama.loadModel({ modelPath: setup.gguf, gpuLayers: 0 });
    const context = () => model.createContext({ contextSize: 4096, threads });
    const predictor = new library.InputLookupTokenPredictor();
    sequences = {
        generate: (await context()).getSequence(),
        "input-lookup": (await context()).getSequence({ tokenPredictor: predictor }),
    };
    stopTokens = new Set(setup.stop_token_ids);
    return {
        methods: Object.keys(sequences),
        device: "cpu",
        dtype: model.typeDescription,
        versions: { "node-llama-cpp": version, "llama.cpp": llama.llamaCppRelease.release },
        skipped: {},
    };
}

async function decode({ prompts, method, max_tokens }) {
    const [promptIds] = prompts; // one at a time
    const sequence = sequences[method];
    await sequence.clearHistory();
    sequence.tokenPredictor?.updateInputTokens?.(promptIds);
    const before = sequence.tokenPredictions.used;
    const tokenIds = [];
    const started = performance.now();
    let first, last, usage;
    for await (const token of sequence.evaluate(promptIds, { temperature: 0 })) {
        last = (performance.now() - started) / 1000;
        first ??= last;
        usage ??= process.cpuUsage();
        tokenIds.push(token);
        if (stopTokens.has(token) || tokenIds.length === max_tokens) break;
    }
    const accepted = sequence.tokenPredictions.used - before;
    const { user, system } = process.cpuUsage(usage);
    return {
        token_ids: [tokenIds],
        first: [first],
        seconds: last,
        processor_seconds: (user + system) / 1e6,
        forwards: tokenIds.length - 1 - accepted,
    };
}

for await (const line of createInterface({ input: process.stdin })) {
    let reply;
    try {
        reply = await (sequences === undefined ? load : decode)(JSON.parse(line));
    } catch (error) {
        console.error(error);
        reply = { error: String(error).split(/\s+/).join(" ") };
    }
    process.stdout.write(JSON.stringify(reply) + "\n");
}
process.exit(0);
