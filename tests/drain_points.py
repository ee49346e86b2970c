"""Where a drain can be killed, and a job that saves by way of its nodes, beside the usual places.

tests/crash/ compares these lists with the source; tests/drain/, tests/tiers/ and tests/remote/ kill there.
"""

DRAIN_FILES = ("journal", "drain-inbox", "drain-receipt", "drain-plan")  # small ones
FAILURE_FILES = ("drain-failure",)  # what a node leaves that gives up
COPY_POINTS = ("drain-chunk", "drain-noted", "drain-copied", "drain-named", "drain-all-copied", "drain-delivered")
COMMIT_POINTS = ("drain-placed", "drain-all-placed", "drain-published", "drain-discarded", "drain-committed")
NODE_POINTS = ("drain-retired",)
DRAIN_POINTS = (
    *(f"{name}-{end}" for name in DRAIN_FILES for end in ("written", "renamed")),
    *COPY_POINTS,
    *COMMIT_POINTS,
    *NODE_POINTS,
)
FAILURE_POINTS = tuple(f"{name}-{end}" for name in FAILURE_FILES for end in ("written", "renamed"))
RUN_POINTS = ("run-written", "run-named")  # at the first save of a run
SPREAD_POINTS = ("spread",)
UPLOAD_FILES = ("remote", "taken")  # small ones, of what is carried to an object store
UPLOAD_POINTS = (
    *(f"{name}-{end}" for name in UPLOAD_FILES for end in ("written", "renamed")),
    *("upload-chunk", "upload-file", "upload-complete", "upload-committed", "upload-removed"),
)
