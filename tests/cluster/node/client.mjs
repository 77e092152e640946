// Somebody else's client in another language: @grpc/grpc-js over the .proto files, no code of ours.
//
//   node client.mjs PROTOS DESCRIPTORS HOST:PORT CHART
//
// DESCRIPTORS is a file with the FileDescriptorSet of grpc.health.v1 and grpc.reflection.v1alpha. Prints one JSON object
// with what it saw; tests/cluster/foreign.py says what that has to be.

import { readFileSync } from "node:fs";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [protos, descriptors, target, chart] = process.argv.slice(2);
const options = { keepCase: true, longs: String, enums: String, oneofs: true, arrays: true };
const topk = grpc.loadPackageDefinition(
  protoLoader.loadSync("topk/v1/topk_service.proto", { ...options, includeDirs: [protos] }),
).topk.v1;
const standard = grpc.loadPackageDefinition(
  protoLoader.loadFileDescriptorSetFromBuffer(readFileSync(descriptors), { ...options, enums: Number }),
).grpc;

const FIRST_MS = 1_700_000_000_000;
const STARTED_MS = Date.now();
const SONGS = ["Boston - More Than a Feeling", "Мумий Тролль - Утекай", "🎵"];
const credentials = grpc.credentials.createInsecure();
const deadline = () => new Date(Date.now() + 20_000);

const batch = (sequence) => ({
  producer_id: chart,
  sequence,
  first_sent_ms: STARTED_MS,
  plays: [
    ...SONGS.flatMap((song_id, index) =>
      Array.from({ length: index + 1 }, () => ({ song_id, played_at_ms: FIRST_MS + sequence, charts: [chart] })),
    ),
    { song_id: SONGS[0], played_at_ms: FIRST_MS + 86_400_000, count: 10, charts: [chart] },
    { song_id: "", played_at_ms: FIRST_MS },
  ],
});

const acknowledgement = (response) => ({
  sequence: Number(response.sequence),
  accepted: response.accepted ?? 0,
  duplicate: response.duplicate ?? false,
  rejected: response.rejected.map((play) => [play.index ?? 0, play.reason]),
});

const entries = (list) => list.map((entry) => [Number(entry.rank), entry.song_id, Number(entry.count)]);

const call = (client, method, request) =>
  new Promise((resolve, reject) => {
    client[method](request, { deadline: deadline() }, (error, response) => (error ? reject(error) : resolve(response)));
  });

const exchange = (stream, requests) =>
  new Promise((resolve, reject) => {
    const responses = [];
    stream.on("data", (response) => responses.push(response));
    stream.on("error", reject);
    stream.on("end", () => resolve(responses));
    requests.forEach((request) => stream.write(request));
    stream.end();
  });

const client = new topk.TopKService(target, credentials);
const health = new standard.health.v1.Health(target, credentials);
const reflection = new standard.reflection.v1alpha.ServerReflection(target, credentials);
const seen = {};

const stream = client.StreamPlays({ deadline: deadline() });
seen.stream = (await exchange(stream, [1, 2, 3].map((sequence) => ({ batch: batch(sequence) })))).map(acknowledgement);
seen.again = acknowledgement(await call(client, "RecordPlays", { batch: batch(1) }));
seen.unary = acknowledgement(await call(client, "RecordPlays", { batch: batch(4) }));

let answer = await call(client, "GetTopK", { window: { global: {} }, k: 2, chart });
seen.global = {
  entries: entries(answer.entries),
  bounds: Boolean(answer.bounds),
  complete: answer.certificate.complete ?? false,
  total_plays: Number(answer.certificate.total_plays),
  distinct_songs: Number(answer.certificate.distinct_songs),
  final: answer.certificate.finality === "FINALITY_FINAL",
};
const window = { tumbling: { size_ms: 86_400_000 } };
answer = await call(client, "GetTopK", { window, k: 10, chart, as_of: { time_ms: FIRST_MS } });
seen.day = {
  entries: entries(answer.entries),
  bounds: [Number(answer.bounds.start_ms), Number(answer.bounds.end_ms)],
};
const songs = { window: { global: {} }, song_ids: [SONGS[2], "never played"], chart, neighbours: 1 };
seen.songs = (await call(client, "GetSongs", songs)).songs.map((song) => ({
  song_id: song.song_id,
  count: Number(song.count ?? 0),
  rank: song.rank === undefined ? null : Number(song.rank),
  above: song.above.map((entry) => entry.song_id),
  below: song.below.map((entry) => entry.song_id),
}));
const described = await call(client, "DescribeCluster", {});
seen.cluster = {
  shards: described.shards.map((shard) => shard.shard_id),
  reachable: described.shards.every((shard) => shard.reachable),
  slots: [described.slots, described.shards.reduce((sum, shard) => sum + shard.slots, 0)],
  partitioner: described.partitioner,
};
try {
  await call(client, "GetTopK", { window: { global: {} }, k: 0 });
} catch (error) {
  seen.error = { code: grpc.status[error.code], details: error.details };
}
seen.health = {};
for (const service of ["", "liveness", "readiness"]) {
  seen.health[service] = (await call(health, "Check", { service })).status;
}
const listing = reflection.ServerReflectionInfo({ deadline: deadline() });
const [listed] = await exchange(listing, [{ list_services: "" }]);
seen.services = listed.list_services_response.service.map((service) => service.name).sort();

console.log(JSON.stringify(seen));
for (const each of [client, health, reflection]) each.close();
