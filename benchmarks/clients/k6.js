// Load on Penchant by k6 0.49 or newer: k6 run -e TARGET=127.0.0.1:50051 -e RATE=100 benchmarks/clients/k6.js
//
// USERS, ITEMS (ids from 1 to N) and QUERIES (separated by commas) say whom and what to ask for. k6 counts a latency
// from the moment that a call was sent; what it could not send in time are dropped iterations, so a run with any of
// them has a better latency than its callers had, and fails here.
import grpc from 'k6/net/grpc';
import { check } from 'k6';

const REQUESTS = JSON.parse(open('./requests.json'));
const TARGET = __ENV.TARGET || '127.0.0.1:50051';
const USERS = Number(__ENV.USERS || 6040);
const ITEMS = Number(__ENV.ITEMS || 3883);
const QUERIES = (__ENV.QUERIES || 'star wars,toy story').split(',');
const CANDIDATES = 200;
// The same mix as `penchant bench latency --mix recommend=70,search=10,rank=10,similar=5,ingest=5`.
const MIX = [
  ['penchant.v1.RankingService/Recommend', 70],
  ['penchant.v1.RankingService/Search', 10],
  ['penchant.v1.RankingService/Rank', 10],
  ['penchant.v1.RankingService/SimilarItems', 5],
  ['penchant.v1.EventService/Ingest', 5],
];

export const options = {
  scenarios: {
    open: {
      executor: 'constant-arrival-rate',
      rate: Number(__ENV.RATE || 100),
      timeUnit: '1s',
      duration: __ENV.DURATION || '30s',
      preAllocatedVUs: 50,
      maxVUs: 500,
    },
  },
  thresholds: {
    grpc_req_duration: ['p(99)<50'],
    dropped_iterations: ['count==0'],
    checks: ['rate==1'],
  },
};

const client = new grpc.Client();
client.load(['../../protos'], 'penchant/v1/ranking.proto', 'penchant/v1/event.proto');

let connected = false;

export default function () {
  // Each virtual user keeps its connection: a new one per call would measure handshakes.
  if (!connected) {
    client.connect(TARGET, { plaintext: true });
    connected = true;
  }
  const method = drawn();
  const response = client.invoke(method, filled(REQUESTS[method]), {
    timeout: '1s',
    metadata: { 'penchant-priority': 'interactive' },
  });
  check(response, { 'status is OK': (answer) => answer && answer.status === grpc.StatusOK });
}

function drawn() {
  let left = Math.random() * MIX.reduce((sum, [, weight]) => sum + weight, 0);
  for (const [method, weight] of MIX) {
    left -= weight;
    if (left < 0) {
      return method;
    }
  }
  return MIX[0][0];
}

// Replaces the placeholders of a request: "$user", "$item", "$items", "$query", "$uuid".
function filled(value) {
  if (Array.isArray(value)) {
    return value.map(filled);
  }
  if (value !== null && typeof value === 'object') {
    return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, filled(inner)]));
  }
  switch (value) {
    case '$user':
      return String(1 + Math.floor(Math.random() * USERS));
    case '$item':
      return String(1 + Math.floor(Math.random() * ITEMS));
    case '$items':
      return Array.from({ length: CANDIDATES }, () => filled('$item'));
    case '$query':
      return QUERIES[Math.floor(Math.random() * QUERIES.length)];
    case '$uuid':
      return `k6-${__VU}-${__ITER}-${Date.now()}-${Math.floor(Math.random() * 1e9)}`;
    default:
      return value;
  }
}
