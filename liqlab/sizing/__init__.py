"""Bytes from structure: what a feed takes in Redis under given settings, without a server.

`prepare` reads a feed once, `calibrate` measures a server in a second, and `predict` says what
`liqlab.ingest(feed, redis, settings=...)` leaves there: the bytes of every family at every minute of the feed.

    known = await liqlab.sizing.calibrate(redis)
    prepared = liqlab.sizing.prepare(feed)
    liqlab.sizing.predict(prepared, settings, known).table

It follows the writer, sealing and expiry event by event, and Redis allocation by allocation: `structures` has the
formulas, `entries` what one event takes, `streams` how nodes and blocks fill, `events` and `families` what becomes of
them through time. What is not covered:

* What a cleaner, a detector or the server's own eviction does: only writer, sealing and TTLs.
* Events that come late, and the other strategies of the writer.
* XTRIM's limit of 100 nodes a call: a stream that grows faster than it is trimmed is longer than predicted.
* `tdigest`, whose module keeps digests outside of `used_memory`. What other methods than `logbins` keep is there when
  a detector fills it.
* Of `used_memory`: buffers of clients, and the garbage of scripts, which is in `Predicted.error_bytes`.
"""

from liqlab.sizing.calibrate import calibrate
from liqlab.sizing.model import Calibration, Predicted, predict
from liqlab.sizing.prepare import Prepared, prepare

__all__ = ["Calibration", "Predicted", "Prepared", "calibrate", "predict", "prepare"]
