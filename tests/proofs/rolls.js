// Calls a service through a plain channel of @grpc/grpc-js with the retry policy of docs/retry-policy.json.
//
//   NODE_PATH=.../node_modules node tests/proofs/rolls.js TARGET CALLS_PER_SECOND
//
// Calls until standard input ends, then prints one line of JSON: the calls, and the failures by code.

const fs = require('fs');
const path = require('path');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const root = path.join(__dirname, '..', '..');
const [target, rate] = [process.argv[2], Number(process.argv[3])];
const found = { includeDirs: [path.join(root, 'protos')], keepCase: true, longs: String };
const definition = loader.loadSync('penchant/v1/ranking.proto', found);
const policy = fs.readFileSync(path.join(root, 'docs', 'retry-policy.json'), 'utf8');
const { RankingService } = grpc.loadPackageDefinition(definition).penchant.v1;
const client = new RankingService(target, grpc.credentials.createInsecure(), {
  'grpc.service_config': policy,
  'grpc.enable_http_proxy': 0,
});

let [calls, open, ending] = [0, 0, false];
const failures = {};

function finish() {
  if (ending && !open) {
    console.log(JSON.stringify({ calls, failures }));
    client.close();
    process.exit(0);
  }
}

function call() {
  calls += 1;
  open += 1;
  const options = { request_id: `node-${calls}`, subject: { user_id: `u${calls % 50}` }, page_size: 5 };
  client.Recommend({ options }, { deadline: Date.now() + 2000 }, (error) => {
    open -= 1;
    if (error) {
      const name = grpc.status[error.code];
      failures[name] = (failures[name] || 0) + 1;
      console.error(`${new Date().toISOString()} ${error.message}`);
    }
    finish();
  });
}

const timer = setInterval(call, 1000 / rate);
process.stdin.resume();
process.stdin.on('end', () => {
  clearInterval(timer);
  ending = true;
  finish();
});
