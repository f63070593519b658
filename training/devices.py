"""One batch divided over several devices of one machine, by the backend's own means. Nothing else here knows the backend's.

TensorFlow: `tf.distribute.MirroredStrategy`; JAX: `keras.distribution.DataParallel`. Each device holds all weights and
computes the gradient of its share of the recipe's batch; the mean of the gradients moves all copies alike, as the whole
batch would on one device. What differs: on TensorFlow batch norms see their device's share alone, and dropout draws the same
mask on every device.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

from training.errors import RunError


def virtual_devices() -> int:
    """$BLASTOSCOPE_VIRTUAL_DEVICES: as how many devices the processor is to count, to try several without a GPU; 0 unset."""
    return int(os.environ.get("BLASTOSCOPE_VIRTUAL_DEVICES") or 0)


def find_devices(devices: int) -> list[str]:
    """The first so many devices of this machine, as Keras names them. To be called before the backend computes anything.

    Raises:
        RunError: there are fewer, or the backend cannot divide a batch.
    """
    import keras

    if virtual_devices():
        _divide_processor()
    found = list_devices()
    if devices > len(found):
        raise RunError(f"The recipe asks for {devices} devices. This machine has {len(found)}: {', '.join(found)}.")
    if devices > 1 and keras.backend.backend() not in ("tensorflow", "jax"):
        raise RunError(
            f"Several devices need the TensorFlow or the JAX backend. Received: devices={devices} on {keras.backend.backend()}"
        )
    return found[:devices]


def list_devices() -> list[str]:
    """This machine's GPUs, else its processor, as "gpu:0", ...; Keras itself cannot tell on PyTorch."""
    import keras

    if keras.backend.backend() != "torch":
        return keras.distribution.list_devices()
    import torch

    return [f"gpu:{i}" for i in range(torch.cuda.device_count())] or ["cpu:0"]


@functools.cache  # once a process
def _divide_processor() -> None:
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        parts = [tf.config.LogicalDeviceConfiguration() for _ in range(virtual_devices())]
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], parts)
    elif keras.backend.backend() == "jax":
        import jax

        # XLA's devices wait for each other on its pool of threads: with one for each core of a small or busy machine they
        # may wait until XLA gives up, after 40 s.
        os.environ.setdefault("NPROC", str(4 * virtual_devices()))
        patient = "--xla_cpu_collective_call_terminate_timeout_seconds=3600"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {patient}".strip()
        jax.config.update("jax_num_cpu_devices", virtual_devices())


def keep_memory() -> None:
    """Let this process keep for its next step the memory that it frees, where its C library is glibc.

    That gives batches and activations back at once, and for each step on the processor the kernel would clear them anew, page
    by page: blocks of 32 MB and more, and most of what other threads than the first free, since each has an arena of its own.
    To be called before Keras is imported: threads that are there already keep their arenas.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library
        set_option = ctypes.CDLL(None).mallopt
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
            set_option(option, value)


def keep_compiled(folder: Path) -> None:
    """On JAX, keep what was compiled in `folder`: it would compile each fold's network anew, and again for a resumed run."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", 2_000_000_000)  # bytes; what was used least goes


def spread(devices: int):
    """A context: networks and optimizers made and compiled in it lie on so many devices.

    One network of one device is made on the processor, and its first step moves it, where Keras is on JAX: that compiles each
    initializer of another shape by itself. For EfficientNetB3 that is 250 compilations, about a minute on a GPU.
    """
    import keras

    if devices > 1:
        return _distribution(devices).scope()
    if keras.backend.backend() == "jax":
        with contextlib.suppress(RuntimeError):  # $JAX_PLATFORMS leaves the processor out
            return keras.device("cpu:0")
    return contextlib.nullcontext()


def divided(devices: int):
    """A context for `fit` of what was made in `spread`: each batch is divided. TensorFlow's networks know it by themselves."""
    import keras

    return spread(devices) if keras.backend.backend() == "jax" and devices > 1 else contextlib.nullcontext()


def precise(name: str):
    """A context: a precision policy for the networks built inside."""
    import keras

    return _inside(keras.config.dtype_policy, keras.config.set_dtype_policy, name)


@contextlib.contextmanager
def _inside(read: Callable, write: Callable, value):
    """One of Keras' settings, as it was again behind."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def held(packed, devices: int = 1):
    """The packed cells in the memory of JAX's GPU, if that has four times their room; else as they are, on disk.

    From there a batch is taken by its numbers alone. Copying its pixels from the processor took a tenth of each step of
    EfficientNetB3 (docs/scaling.md).
    """
    import keras

    if keras.backend.backend() != "jax" or devices > 1 or _gpu_memory() <= 4 * packed.nbytes:
        return packed
    import jax

    try:
        # Not bound to the device by name: JAX compiles a step anew for each mixture of arrays that are and that are not.
        return jax.device_put(packed).block_until_ready()
    except jax.errors.JaxRuntimeError:  # other programs hold what is left of it
        return packed


def _gpu_memory() -> int:
    """Bytes that JAX may take of its first GPU; 0 without one."""
    import jax

    gpu = jax.devices()[0]
    return (gpu.memory_stats() or {}).get("bytes_limit", 0) if gpu.platform == "gpu" else 0


def whole():
    """Inside `divided`, a context in which batches are not: a prediction's last one may not be divisible."""
    import keras

    return _inside(keras.distribution.distribution, keras.distribution.set_distribution, None)


@functools.cache  # TensorFlow refuses to mix two
def _distribution(devices: int):
    import keras

    names = find_devices(devices)
    if keras.backend.backend() == "jax":
        return keras.distribution.DataParallel(devices=names)
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([name.upper() for name in names])


def draw_uniform(n, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0, *, seed):
    """`keras.random.uniform((n, *shape))` for the n cells on this device.

    TensorFlow's devices all draw from the same seed. So each draws for the whole batch and takes its own part: no two cells
    are augmented alike, and a cell is augmented alike on however many devices. JAX sees the whole batch anyway.
    """
    import keras

    here, devices = 0, 1
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if replica := tf.distribute.get_replica_context():  # None while the graph is built
            here, devices = replica.replica_id_in_sync_group, replica.num_replicas_in_sync
    drawn = keras.random.uniform((n * devices, *shape), low, high, seed=seed)
    return drawn if devices == 1 else drawn[here * n : (here + 1) * n]
