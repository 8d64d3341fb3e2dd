"""Settings for every test: no network, quiet libraries, one thread."""

import os

# Before any test module imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import settings

# A shared machine stalls now and then: time limits are pytest's task, and a failure must repeat.
settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")
