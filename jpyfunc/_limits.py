"""Every tunable number, with the measurement or the argument that set it.

Where neither is named, the number is a choice. Times are of one core of a current x86
server. A number that changes what is computed, and not only how fast or in how much memory,
is not here: it is no tuning.
"""

# --- Abstract runs: what a body returns, and what of it is compiled (`_staging`).

# Runs of a body on abstract values, to infer its results or to stage it. A run takes some
# milliseconds, and n branch points in a row have 2**n paths.
MAX_ABSTRACT_RUNS = 32
# Branch points of one run. A loop on an abstract condition has one in each iteration, and
# may never end.
MAX_BRANCH_POINTS = 64
# Truth tests in all runs of one exploration, and each time that it begins again, after
# which no loops are looked for. With the operations in between, one takes 0.4 ms.
MAX_TESTS_IN_TOTAL = 4000
# Objects that the variables at a truth test lead to, at 2 us each, and those of all tests
# of one exploration.
MAX_PICTURED_OBJECTS = 10_000
MAX_PICTURED_IN_TOTAL = 300_000
# What a counter that nothing bounds is assumed to remain below, and how much it may change
# in an iteration of a loop that carries it: beyond, an array could wrap around. Python
# takes 28 us for `x = x / c; n += 1` and a test of `x`, and half an hour to count so far.
MAX_COUNT, MAX_COUNT_STEP = 2**27, 2
# What such a counter may begin with.
MAX_FIRST_COUNT = 2**24
# Functions whose bytecode has been looked at for loops.
BYTECODE_CACHE_SIZE = 1024
# Elements of an array that is embedded in the program as its value. What is larger, and can
# be computed from less, is computed by the program: XLA would keep megabytes of literals.
MAX_CONSTANT_SIZE = 64
# Operations in a row by which such an array is computed; comparing two runs follows them.
MAX_CONSTANT_DEPTH = 100
# Places in a staged body where Python is called. Of 800, some behind 60 branches, XLA took
# more than a minute to compile the program; of 60 in ten branches, 0.2 s.
MAX_CALLS = 64
# Operations of a staged body without a warning. XLA compiles a thousand in 0.1 s if they
# are elementwise and on scalars, in 0.6 s if products and sorts of 8 x 8 matrices are among
# them.
MAX_STAGED_OPERATIONS = 1000

# --- The search through what a body holds (`_staging/closure.py`), at every traced call.

# Objects, at 2 to 6 us each: a body may hold all of a program's data.
MAX_HELD_OBJECTS = 10_000
# Containers, which are opened by functions in C: 4 ms for 20,000 lists.
MAX_OPENED_CONTAINERS = 100_000
# Objects that are compared to tell one call inside an explored body from another, and the
# bytes of an array among them. Beyond, the call is explored again: slow, never wrong.
MAX_FINGERPRINT_OBJECTS = 1000
MAX_FINGERPRINT_BYTES = 2**16

# --- Derivatives of loops (`_loops`).

# Carries that a loop saves for its derivative: as many as fit into these bytes, but not
# fewer or more than these numbers. The gradient of 300 iterations over a million numbers
# takes 8.0 s with 8 carries in 116 MB, 7.5 with 16 in 212 and 6.5 with 32 in 404. That of
# 1,000 iterations over 1,000 numbers takes 7.6 ms with 256 or 512 and 9.0 with 64; of
# 20,000 over one number, 1.0 ms with 32 or 128 and 0.75 with 512. A batch of gradients
# saves as many for each element.
SAVED_BYTES = 2**24
MIN_SLOTS, MAX_SLOTS = 16, 128

# --- Tapes (`_runtime/tape_cache.py`).

# What all tapes may hold in bytes; `set_tape_limit` changes it.
DEFAULT_TAPE_LIMIT = 2**30
# Bytes that an array takes beside its data, in objects of XLA, JAX and Python, at most: the
# resident size of a process that makes 100,000 scalars grows by 1,800 to 2,200 for each.
ARRAY_OVERHEAD = 4096
# The shares of the limit that spent tapes may hold: of pure bodies, which can run again,
# and of stateful ones, where a pullback that is called twice finds its tape or fails.
# 20,000 steps of `value_and_grad` of `sin(x) * x` then grow a process by 4 to 7 MB, and by
# 17 to 22 MB.
SPENT_SHARE = 1 / 256
SPENT_STATEFUL_SHARE = 1 / 64
# Residuals of unknown size that are cached at once: SciPy's factors of a sparse matrix may
# be megabytes, of which Python knows 100 bytes.
MAX_RESIDUALS_OF_UNKNOWN_SIZE = 256
# Objects that residuals refer to whose sizes are added up, at 0.5 us each.
MAX_REFERENTS = 1000

# --- Operations of bodies on values (`_interpreters`).

# Compiled operations at first; the cache grows with bodies of more distinct ones.
OPERATION_CACHE_SIZE = 1024
# Evicted keys that a cache remembers, integers of less than 100 bytes: more distinct
# operations than any body could compile in ten minutes.
MAX_EVICTED_KEYS = 2**16
# Entries of a tape whose reverse sweep is compiled as one program: 63, elementwise and on
# scalars, take 0.12 s to compile.
MAX_SWEEP_ENTRIES = 64
# Distinct structures of tapes of one function, beyond which there may be any number.
MAX_SWEEP_STRUCTURES = 8
# Tapes of one structure before its sweep is compiled: a loop whose length is another in
# each run should compile nothing.
MIN_SWEEPS = 3
# Functions whose sweeps are remembered.
SWEEP_CACHE_SIZE = 256

# --- Batches by branch (`subset.py`, `replay_log.py` and `batch_tracer.py` of
# `_interpreters`, `_bodies/batch_elements.py`).

# Lengths of arrays of many elements, 128, 1024 and 8192, up to so many bytes: a sine of
# that size takes 19 us, of a few elements 4, and Python needs some 20 to get there. The
# first 30 batches of rejection sampling, of 20 elements, take 1.5 s; with powers of two, 8.
SHORTEST_ROWS, ROWS_GROWTH = 128, 8
MAX_PADDED_BYTES = 2**15
# Bytes of operands and results that a run by branch begins with; larger batches are run in
# chunks, to bound memory.
MAX_BATCH_BYTES = 2**26
# Bytes of one element beyond which elements run one by one: operations take longer than
# Python does then, and the arrays of one element fit a cache of the processor.
MAX_ELEMENT_BYTES = 2**17
# Bytes of an array of all rows below which random bits of many keys are drawn in a loop.
# Those of many keys take XLA 0.3 to 0.7 s to compile for CPUs, however many there are;
# those of one key 0.1 to 0.2 s, and so does a loop over keys, which is as fast up to this:
# `split(key, 3)` of 128 keys takes 16 us in a loop and 36 at once, `uniform` 9 and 13, but
# of 1,024 keys 36 and 19.
MAX_LOOPED_BYTES = 3 * 2**10
# Bytes of results in the log of a run, for the elements that leave it at a split.
MAX_LOG_BYTES = 2**28
# Functions, signatures of calls and sizes of batches that are known not to run by branch.
REFUSAL_CACHE_SIZE = 256
# Rows that an array is unpacked into at once, and that are shown of one which is printed.
MAX_UNSTACKED_ROWS = 32
SHOWN_ELEMENTS = 6

# --- Executors (`_executors`).

# Decorators between a function and its name, which a worker looks for it by.
MAX_DECORATORS = 64
# Seconds for which all threads of a pool use no CPU before its next task runs elsewhere:
# functions that sleep for longer, and a second program that waits for the same pool, have
# one task more than threads. Seconds from one look to the next, which takes 20 us.
STALL_SECONDS, STALL_INTERVAL = 1.0, 0.1

# --- Programs and failures (`_runtime`, `_primitive`).

# Bytes below which XLA copies an array inline.
LARGE_ARRAY_BYTES = 2**16
# Bytes of the report that tells every device what a body raised. One line of a body and
# the hint take some 470; of a longer text, the beginning and the end are kept.
REPORT_BYTES = 8192
# Failures that can be found by their markers, of programs that may still be waited for.
MAX_FAILURES = 1024
# Exceptions that are kept as objects, with the variables of the frames that they went
# through, and so their arrays, while a block of `raise_original` is open.
MAX_KEPT_EXCEPTIONS = 16
# Seconds after which the end of a block no longer waits for a body that is itself waiting,
# for a lock for example; and for one that began before the block, and may have nothing to
# do with it.
PATIENCE = 5.0
PATIENCE_BEFORE = 0.5
# Seconds for which Python's end is put off for what is computed before a body begins.
PATIENCE_AT_EXIT = 60.0
# Seconds without a body after which none is to come of a program whose results are dropped
# and whose thread has ended.
QUIET = 0.1
# Seconds that a batch runs before it shows a bar, and from one look at it to the next.
BAR_DELAY, BAR_INTERVAL = 0.5, 0.1
# Seconds between two looks at what is waited for, at first and at last: an eager call takes
# 20 us, and for a long body a look every 10 ms is cheap.
SHORTEST_PAUSE, LONGEST_PAUSE = 2e-5, 0.01
# Relative error of linearity that a transposed host function may show. Sums and products
# scale by -2 without any, but a solver that stops at an absolute tolerance does not.
LINEARITY_TOLERANCE = 1e-2

# --- The report (`__main__`).

# Error of float32 in a handful of operations and a logarithm.
TOLERANCE = 1e-5
# Seconds for which each cost is measured.
SECONDS_PER_COST = 0.4
