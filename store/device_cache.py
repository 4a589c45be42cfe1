"""What the lookup cache keeps in Redis, and the three rules that keep it from answering what is no longer so.

It decides nothing about failures (store/lookup.py does) and knows nothing of PostgreSQL. The keys:

```
device:<device_id>       `<epoch>.<shape> <JSON of DeviceFacts>`, or `?<token>` while somebody reads the row
serial:<serial number>   `=<device_id>`, or `?<token>`
tidegate:lookup:fresh    the epoch, while changes are known to arrive; expires by itself
tidegate:lookup:state    `<epoch>:<count>`, what the one writer of invalidations has written last
```

1. **Leases.** Whoever misses puts a token of its own where the entry would be, then reads PostgreSQL, and stores only if
   the token is still there. An invalidation removes entry and token alike, so a row that was read before a change is not
   stored after it. (The leases of "Scaling Memcache at Facebook", NSDI 2013, section 3.2.1.)
2. **Freshness.** Entries count while `fresh` stands. The relay of invalidations (activities/cache.py) sets it for
   `FRESH_MS` after it has found nothing left to deliver. When no invalidation can arrive, because PostgreSQL, the relay
   or the way between is down, no entry is believed after that time. The expiry is a time of Redis's own clock taken
   before the relay looked, so that a command that was held up somewhere cannot vouch for the time it was held up.
3. **Epochs.** Entries of another epoch do not count. The relay begins a new one whenever it may have missed a change,
   and when Redis has lost a write: each of its writes names the one before, which a Redis that came back from a
   snapshot, or a replica that took over, does not have.

The index of serial numbers needs no rule: an answer counts only if the device in it bears the serial number.
Entries are written and read with one key at a time or from inside a script, which Redis Cluster does not allow.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from models.device import DeviceFacts
from models.errors import InvalidInputError, TidegateError

TTL_SECONDS = 300
LEASE_MS = 5_000
"""How long a token stands when its reader has died; meanwhile another reader replaces it."""
FRESH_MS = 2_000
"""How old an answer from the cache can get, whatever fails."""
CONNECTIONS = 16

FRESH, STATE = "tidegate:lookup:fresh", "tidegate:lookup:state"
SHAPE = hashlib.sha256(",".join(DeviceFacts.model_fields).encode()).hexdigest()[:8]
"""Of what fields an entry consists; a process of another version takes no entry that lacks some."""

_BY_SERIAL = """
local id = redis.call('MGET', KEYS[1])[1]
local fresh = redis.call('GET', KEYS[2])
if not id or string.sub(id, 1, 1) ~= '=' then return {false, fresh} end
return {redis.call('MGET', 'device:' .. string.sub(id, 2))[1], fresh}
"""

_STORE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[4])
redis.call('SET', KEYS[3], ARGV[3], 'EX', ARGV[4])
return 1
"""

# ARGV: the state that was written last, and the one to write now. An earlier try to write that one counts: its answer
# may have been lost.
_IF_OURS = """
local state = redis.call('GET', KEYS[1])
if state ~= ARGV[1] and state ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
"""
_FORGET = f"{_IF_OURS} redis.call('UNLINK', unpack(KEYS, 2)) return 1"
_VOUCH = f"{_IF_OURS} redis.call('SET', KEYS[2], ARGV[3], 'PXAT', ARGV[4]) return 1"


class UnvouchedError(TidegateError):
    """No relay says at present that invalidations arrive: nothing in the cache may be believed."""


class CacheLostError(TidegateError):
    """Redis has not what the relay wrote last: writes are lost, or somebody else writes."""


@dataclass(frozen=True)
class Wanted:
    """What is looked up: `key` is where its entry, or the way to it, is kept."""

    key: str
    device_id: str | None = None
    serial_number: str | None = None

    def is_met_by(self, device: DeviceFacts) -> bool:
        """Whether this is the device that was asked for."""
        return device.device_id == self.device_id or device.serial_number == self.serial_number


def by_id(device_id: str) -> Wanted:
    """The device of this id."""
    return Wanted(f"device:{device_id}", device_id=device_id)


def by_serial(serial_number: str) -> Wanted:
    """The device of this serial number."""
    return Wanted(f"serial:{serial_number}", serial_number=serial_number)


@dataclass(frozen=True)
class Lease:
    """The right to store what is read from PostgreSQL from now on, while nothing about it changes."""

    wanted: Wanted
    token: str
    epoch: bytes


def open_redis(url: str, timeout_seconds: float) -> Redis:
    """A client that fails after `timeout_seconds` and tries nothing twice. Raises InvalidInputError for an odd address."""
    try:
        return Redis.from_url(
            url,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 0),
            max_connections=CONNECTIONS,
        )
    except ValueError as error:
        raise InvalidInputError(
            f"not an address of Redis: expected redis://host:port/0, as TIDEGATE_REDIS_URL has it: {error}"
        ) from error


class DeviceCache:
    """Readers' side. Every method may raise RedisError, OSError or UnvouchedError."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._by_serial = redis.register_script(_BY_SERIAL)
        self._store = redis.register_script(_STORE)
        self._room = asyncio.Semaphore(CONNECTIONS)

    async def find(self, wanted: Wanted) -> DeviceFacts | Lease:
        """The device, or the right to store it."""
        async with self._room:
            entry: Any  # bytes or None, as the client decodes nothing
            fresh: Any
            if wanted.device_id is not None:
                entry, fresh = await self._redis.mget(wanted.key, FRESH)
            else:
                entry, fresh = await self._by_serial([wanted.key, FRESH])
            if fresh is None:
                raise UnvouchedError("nobody vouches for the cache; a worker that has TIDEGATE_REDIS_URL does")
            device = decode(entry, fresh) if entry else None
            if device is not None and wanted.is_met_by(device):
                return device
            lease = Lease(wanted, "?" + secrets.token_hex(8), fresh)
            await self._redis.set(wanted.key, lease.token, px=LEASE_MS)
            return lease

    async def store(self, device: DeviceFacts, lease: Lease) -> bool:
        """Keep what was read under this lease; False where something has changed since."""
        id_key, serial_key = f"device:{device.device_id}", f"serial:{device.serial_number}"
        entry, index = encode(device, lease.epoch), f"={device.device_id}"
        async with self._room:
            kept = await self._store([lease.wanted.key, id_key, serial_key], [lease.token, entry, index, TTL_SECONDS])
        return bool(kept)

    async def close(self) -> None:
        """Close every connection."""
        await self._redis.aclose()


def encode(device: DeviceFacts, epoch: bytes) -> bytes:
    """An entry."""
    return b"%s.%s %s" % (epoch, SHAPE.encode(), device.model_dump_json().encode())


def decode(entry: bytes, epoch: bytes) -> DeviceFacts | None:
    """What an entry holds, or None: it is of another epoch or version, a token, or no entry at all."""
    head, _, text = entry.partition(b" ")
    if head != b"%s.%s" % (epoch, SHAPE.encode()):
        return None
    try:
        return DeviceFacts.model_validate_json(text)
    except ValueError:
        return None


class CacheWriter:
    """The relay's side: the only one that invalidates. Every method may raise RedisError, OSError or CacheLostError."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._forget = redis.register_script(_FORGET)
        self._vouch = redis.register_script(_VOUCH)
        self._epoch, self._count = "", 0

    async def begin(self) -> str:
        """Begin an epoch: no entry that there is counts any more. Nothing is vouched for yet."""
        self._epoch, self._count = secrets.token_hex(8), 0
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.set(STATE, self._state(0))
            pipeline.delete(FRESH)
            await pipeline.execute()
        return self._epoch

    async def clock_ms(self) -> int:
        """Redis's own time."""
        seconds, microseconds = await self._redis.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def forget(self, devices: Sequence[tuple[str, str]]) -> None:
        """Remove the entries of these (device id, serial number), and the leases on them."""
        keys = {f"device:{device_id}" for device_id, _ in devices} | {f"serial:{serial}" for _, serial in devices}
        await self._write(self._forget, sorted(keys))

    async def vouch(self, looked_at_ms: int) -> None:
        """Every change that had been committed at this time of `clock_ms` has been forgotten."""
        await self._write(self._vouch, [FRESH], self._epoch, looked_at_ms + FRESH_MS)

    async def end(self) -> None:
        """Vouch no longer."""
        await self._redis.delete(FRESH)

    async def close(self) -> None:
        """Close every connection."""
        await self._redis.aclose()

    def _state(self, count: int) -> str:
        return f"{self._epoch}:{count}"

    async def _write(self, script: Any, keys: Sequence[str], *arguments: object) -> None:
        before, after = self._state(self._count), self._state(self._count + 1)
        if not await script([STATE, *keys], [before, after, *arguments]):
            raise CacheLostError(f"Redis has another state than {before}, which was written last")
        self._count += 1
