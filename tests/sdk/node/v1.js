// npm `aws-iot-device-sdk`: thingShadow, or jobs. Each has a connection of its own, and a device has one client id.
'use strict';
const awsIot = require('aws-iot-device-sdk');
const { event, serve, options } = require('./lines.js');

const thing = options.thing;
const connection = {
  host: options.host,
  port: options.port,
  keyPath: options.key,
  certPath: options.certificate,
  caPath: options.ca,
  clientId: thing,
  protocol: 'mqtts',
  baseReconnectTimeMs: 250,
  maximumReconnectTimeMs: 1000,
};

function shadows() {
  const client = awsIot.thingShadow(connection, { operationTimeout: 20000 });
  const waiting = new Map();
  client.on('status', (_name, status, token, body) => {
    const settle = waiting.get(token);
    waiting.delete(token);
    if (settle) settle.resolve({ accepted: status === 'accepted', body: { ...body, clientToken: token } });
  });
  client.on('timeout', (_name, token) => {
    const settle = waiting.get(token);
    waiting.delete(token);
    if (settle) settle.reject(new Error('the SDK has waited in vain'));
  });
  client.on('delta', (_name, body) => event('delta', '', body));
  client.on('message', (_topic, payload) => event('documents', '', JSON.parse(payload)));
  client.on('error', () => {});
  const calls = {
    'shadow-get': () => client.get(thing),
    'shadow-update': (body) => client.update(thing, body),
    'shadow-delete': () => client.delete(thing),
  };
  client.once('connect', () =>
    // The SDK names the version that it knows in every update, and takes none from the application.
    client.register(thing, { persistentSubscribe: true, enableVersioning: true, discardStale: true }, () =>
      client.subscribe(`$aws/things/${thing}/shadow/update/documents`, { qos: 1 }, () =>
        serve(
          (verb, body) =>
            new Promise((resolve, reject) => {
              const token = calls[verb](body || {});
              if (token === null) reject(new Error('the SDK is still waiting for another answer'));
              else waiting.set(token, { resolve, reject });
            }),
          () => new Promise((done) => client.end(false, done)),
        ),
      ),
    ),
  );
}

// The SDK gives a job to its subscriber, and the job has calls to report with; what is answered to them it drops.
function jobs() {
  const client = awsIot.jobs(connection);
  let current = null;
  client.on('error', () => {});
  const report = (state) => (body) =>
    new Promise((resolve, reject) =>
      current[state](body.statusDetails, (error) =>
        error ? reject(error) : resolve({ accepted: true, body: { status: current.status } }),
      ),
    );
  const calls = {
    IN_PROGRESS: report('inProgress'),
    SUCCEEDED: report('succeeded'),
    FAILED: report('failed'),
  };
  client.once('connect', () => {
    client.subscribeToJobs(thing, (error, job) => {
      if (error) return event('error', '', { message: String(error) });
      current = job;
      return event('job', '', { jobId: job.id, operation: job.operation, status: job.status, document: job.document });
    });
    serve(
      (verb, body) =>
        verb === 'start-notifications'
          ? new Promise((resolve, reject) =>
              client.startJobNotifications(thing, (error) => (error ? reject(error) : resolve({ accepted: true, body: {} }))),
            )
          : calls[body.status](body),
      () => new Promise((done) => client.end(false, done)),
    );
  });
}

if (options.what === 'jobs') jobs();
else shadows();
