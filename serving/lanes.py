"""Images on their way through a Recognizer: endless streams, and the replacement of the model under way."""

from __future__ import annotations

import argparse
import collections
import io
import logging
import math
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import infer

from PIL import Image

MOST_TOPK = 100  # labels that a request may ask for; the model gives that many, and what is not wanted is cut off
# Decoding that takes long has a lane of its own, in pixels; beyond what phones take. Each of the many scans of a
# progressive JPEG goes over the whole image.
LARGE, SCANS = 16e6, 16

log = logging.getLogger("wwts")


class BusyError(Exception):
    """There are as many images waiting as may be."""


def estimate_cost(data: bytes) -> float:
    """The pixels that decoding has to write; 0 where Pillow cannot tell, infinity where they are too many for it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.width * image.height * (SCANS if image.info.get("progressive") else 1)
    except Image.DecompressionBombError:
        return math.inf
    except Exception as error:  # a broken file can make Pillow raise anything; infer.py says what is wrong with it
        log.debug("%s", error)
        return 0


class Lane:
    """One endless stream of a Recognizer. It batches what has arrived, and answers in order of arrival."""

    def __init__(self, recognizer: infer.Recognizer, limit: int):
        self.limit, self.error = limit, None
        self._recognizer, self._lock = recognizer, threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[io.BytesIO, Future] | None] = queue.SimpleQueue()
        self._running: collections.deque[Future[infer.Result]] = collections.deque()
        threading.Thread(target=self._run, daemon=True).start()

    def __len__(self) -> int:
        return self._waiting.qsize() + len(self._running)

    def put(self, data: bytes) -> Future[infer.Result]:
        """Take an image file. The future raises ModelError if the model fails; it may be cancelled until it runs."""
        future: Future[infer.Result] = Future()
        with self._lock:
            if self.error is None:
                self._waiting.put((io.BytesIO(data), future))
            else:
                future.set_exception(self.error)
        return future

    def close(self) -> None:
        """End the stream after what was taken is answered."""
        self._waiting.put(None)

    def _images(self) -> Iterator[io.BytesIO]:
        while (entry := self._waiting.get()) is not None:
            image, future = entry
            with self._lock:
                if self.error is not None:
                    future.set_exception(self.error)
                    continue
                if not future.set_running_or_notify_cancel():
                    continue
                self._running.append(future)
            yield image

    def _run(self) -> None:
        try:
            for result in self._recognizer.stream(self._images()):
                self._running.popleft().set_result(result)
        except Exception as error:  # the stream ends with it, and all that are in it get it
            log.error("%s", infer.one_line(error))
            with self._lock:
                self.error = error
                for future in self._running:
                    future.set_exception(error)
            self.close()


class Service:
    """A Recognizer with a lane for ordinary images and one for large ones, so that none waits for a slow one.

    ``observe_batch`` is told the size of each batch. But for ``build``, all is for the thread of the event loop.
    """

    def __init__(self, arguments: argparse.Namespace, observe_batch: Callable[[int], None]):
        self._arguments, self._observe_batch = arguments, observe_batch
        self.lanes: list[Lane] = []
        self.use(self.build())

    def build(self) -> infer.Recognizer:
        """Load the model as it is now and let it answer once; raises ModelError."""
        recognizer = infer.build_recognizer(self._arguments, topk=MOST_TOPK)
        engine = recognizer.load()
        classify = engine.classify

        def observed(batch: list, topk: int) -> tuple:
            self._observe_batch(len(batch))
            return classify(batch, topk)

        engine.classify = observed
        error = recognizer(Image.new("RGB", (engine.spec.crop, engine.spec.crop))).error
        if error is not None:
            raise infer.ModelError(f"模型 {engine.spec.name} 不能识别图片: {error}")
        return recognizer

    def use(self, recognizer: infer.Recognizer) -> None:
        """Give what comes from now on to a recognizer; the one before it answers what it has taken."""
        for lane in self.lanes:
            lane.close()
        limits = self._arguments.queue, max(self._arguments.queue // 8, 1)
        self.recognizer, self.lanes = recognizer, [Lane(recognizer, limit) for limit in limits]

    def put(self, images: list[bytes], costs: list[float]) -> list[Future[infer.Result]]:
        """Take image files with what they cost, all or none; raises BusyError where too many wait.

        An idle lane takes any number.
        """
        numbers = [int(cost > LARGE) for cost in costs]
        for number, lane in enumerate(self.lanes):
            if lane.error is not None:
                lane = self.lanes[number] = Lane(self.recognizer, lane.limit)
            if len(lane) and numbers.count(number) and len(lane) + numbers.count(number) > lane.limit:
                raise BusyError
        return [self.lanes[number].put(image) for number, image in zip(numbers, images, strict=True)]
