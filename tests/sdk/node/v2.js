// npm `aws-iot-device-sdk-v2`: request-response clients and classic ones, each over MQTT 5 and over MQTT 3.1.1.
'use strict';
const { randomUUID } = require('crypto');
const { once } = require('events');
const { io, iot, iotjobs, iotshadow, mqtt, mqtt5 } = require('aws-iot-device-sdk-v2');
const { event, serve, options } = require('./lines.js');

const thing = options.thing;
const OF_JOBS = {
  'get-pending': 'GetPendingJobExecutions',
  'start-next': 'StartNextPendingJobExecution',
  describe: 'DescribeJobExecution',
  update: 'UpdateJobExecution',
};
const OF_SHADOWS = { 'shadow-get': 'Get', 'shadow-update': 'Update', 'shadow-delete': 'Delete' };
const low = (name) => name[0].toLowerCase() + name.slice(1);
const subject = (shadow, job) => ({
  thingName: thing,
  ...(shadow ? { shadowName: shadow } : {}),
  ...(job ? { jobId: job } : {}),
});
const call = (verb, shadow) => OF_JOBS[verb] || `${OF_SHADOWS[verb]}${shadow ? 'NamedShadow' : 'Shadow'}`;

function over5() {
  const builder = iot.AwsIotMqtt5ClientConfigBuilder.newDirectMqttBuilderWithMtlsFromPath(
    options.host,
    options.certificate,
    options.key,
  );
  builder.withCertificateAuthorityFromPath(undefined, options.ca);
  builder.withPort(options.port);
  builder.withConnectProperties({ clientId: thing, keepAliveIntervalSeconds: 60 });
  builder.withMinReconnectDelayMs(250);
  builder.withMaxReconnectDelayMs(1000);
  const client = new mqtt5.Mqtt5Client(builder.build());
  client.on('error', () => {});
  return {
    client,
    start: async () => {
      const connected = once(client, 'connectionSuccess');
      client.start();
      await connected;
    },
    stop: async () => {
      const stopped = once(client, 'stopped');
      client.stop();
      await stopped;
      client.close();
    },
  };
}

function over311() {
  const builder = iot.AwsIotMqttConnectionConfigBuilder.new_mtls_builder_from_path(options.certificate, options.key);
  builder.with_certificate_authority_from_path(undefined, options.ca);
  builder.with_endpoint(options.host);
  builder.with_port(options.port);
  builder.with_client_id(thing);
  builder.with_clean_session(true);
  builder.with_reconnect_min_sec(1);
  builder.with_reconnect_max_sec(2);
  const client = new mqtt.MqttClient(new io.ClientBootstrap()).new_connection(builder.build());
  client.on('error', () => {});
  return { client, start: () => client.connect(), stop: () => client.disconnect() };
}

// --- IotShadowClientv2, IotJobsClientv2 ---

async function requestResponse(link, is5) {
  const limits = { maxRequestResponseSubscriptions: 10, maxStreamingSubscriptions: 10, operationTimeoutInSeconds: 60 };
  const make = is5 ? 'newFromMqtt5' : 'newFromMqtt311';
  const shadows = iotshadow.IotShadowClientv2[make](link.client, limits);
  const jobs = iotjobs.IotJobsClientv2[make](link.client, limits);
  await link.start();
  const listen = async (stream, kind, shadow) => {
    stream.on('incomingPublish', (message) => event(kind, shadow, message.message));
    stream.on('incomingPublishError', (failure) => event(kind, shadow, { misread: String(failure.error) }));
    const established = once(stream, 'subscriptionStatus');
    stream.open();
    await established;
  };
  for (const shadow of options.shadows) {
    const named = shadow ? 'Named' : '';
    await listen(shadows[`create${named}ShadowDeltaUpdatedStream`](subject(shadow)), 'delta', shadow);
    await listen(shadows[`create${named}ShadowUpdatedStream`](subject(shadow)), 'documents', shadow);
  }
  await listen(jobs.createJobExecutionsChangedStream(subject()), 'notify', '');
  await listen(jobs.createNextJobExecutionChangedStream(subject()), 'notify-next', '');
  serve(
    async (verb, body, shadow, job) => {
      const client = OF_JOBS[verb] ? jobs : shadows;
      try {
        return { accepted: true, body: await client[low(call(verb, shadow))]({ ...body, ...subject(shadow, job) }) };
      } catch (error) {
        if (!error.modeledError) throw error;
        return { accepted: false, body: error.modeledError };
      }
    },
    async () => {
      shadows.close();
      jobs.close();
      await link.stop();
    },
  );
}

// --- IotShadowClient, IotJobsClient ---

async function classic(link, is5) {
  const make = (kind) => (is5 ? kind.newFromMqtt5Client(link.client) : new kind(link.client));
  const shadows = make(iotshadow.IotShadowClient);
  const jobs = make(iotjobs.IotJobsClient);
  const qos = mqtt.QoS.AtLeastOnce;
  await link.start();
  const heard = (kind, shadow) => (error, message) => event(kind, shadow, error ? { misread: String(error) } : message);
  for (const shadow of options.shadows) {
    const named = shadow ? 'Named' : '';
    await shadows[`subscribeTo${named}ShadowDeltaUpdatedEvents`](subject(shadow), qos, heard('delta', shadow));
    await shadows[`subscribeTo${named}ShadowUpdatedEvents`](subject(shadow), qos, heard('documents', shadow));
  }
  await jobs.subscribeToJobExecutionsChangedEvents(subject(), qos, heard('notify', ''));
  await jobs.subscribeToNextJobExecutionChangedEvents(subject(), qos, heard('notify-next', ''));
  const waiting = new Map();
  const subscribed = new Set();
  const answered = (accepted) => (error, body) => {
    const settle = body && waiting.get(body.clientToken);
    if (settle) settle({ accepted, body });
  };
  serve(
    async (verb, body, shadow, job) => {
      const client = OF_JOBS[verb] ? jobs : shadows;
      const name = call(verb, shadow);
      if (!subscribed.has(`${name} ${shadow} ${job}`)) {
        await client[`subscribeTo${name}Accepted`](subject(shadow, job), qos, answered(true));
        await client[`subscribeTo${name}Rejected`](subject(shadow, job), qos, answered(false));
        subscribed.add(`${name} ${shadow} ${job}`);
      }
      const clientToken = (body && body.clientToken) || randomUUID();
      const answer = new Promise((resolve, reject) => {
        waiting.set(clientToken, resolve);
        setTimeout(() => reject(new Error('not answered within 20 s')), 20000).unref();
      });
      await client[`publish${name}`]({ ...body, clientToken, ...subject(shadow, job) }, qos);
      return answer;
    },
    () => link.stop(),
  );
}

const is5 = options.mqtt === 5;
(options.what === 'classic' ? classic : requestResponse)(is5 ? over5() : over311(), is5).catch((error) => {
  console.error(error);
  process.exit(1);
});
