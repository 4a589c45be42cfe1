// How a script talks with the test: requests come as JSON lines, answers and events go as JSON lines.
'use strict';
const readline = require('readline');

// Times are numbers on the wire, and some SDKs make dates of them.
const write = (message) =>
  process.stdout.write(
    JSON.stringify(message, function (key, value) {
      return this[key] instanceof Date ? this[key].getTime() / 1000 : value;
    }) + '\n',
  );

const event = (kind, shadow, body) => write({ event: kind, shadow, body });

// Answer every request with what `ask` promises; end with `close` when the test closes the pipe.
function serve(ask, close) {
  const lines = readline.createInterface({ input: process.stdin });
  lines.on('line', (line) => {
    const { n, verb, shadow, job, body } = JSON.parse(line);
    Promise.resolve()
      .then(() => ask(verb, body, shadow, job))
      .then(({ accepted, body: answer }) => write({ n, accepted, body: answer }))
      .catch((error) => write({ n, error: String((error && error.stack) || error) }));
  });
  lines.on('close', () => Promise.resolve(close()).then(() => setTimeout(() => process.exit(0), 2000).unref()));
  write({ ready: true });
}

const options = JSON.parse(process.argv[2]);

module.exports = { event, serve, options };
