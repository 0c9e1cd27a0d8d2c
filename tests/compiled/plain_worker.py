"""The worker with plain dot kernels: python plain_worker.py JOBDIR."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from lower_helpers import PlainBackend

from bitwright.compiler.lower.job import Job
from bitwright.compiler.lower.worker import main

sys.exit(main(Job(Path(sys.argv[1])), PlainBackend()))
