"""One model over this process and local node processes: the first stage here, the others started, linked and watched.

Knows checkpoints, launchers and links; nothing of requests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from mdi.checkpoint.load import LoadedStage, load_chunk, load_source
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.plan import make_plan, role_names
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import Source
from mdi.cluster.launcher import LocalLauncher
from mdi.errors import CheckpointError
from mdi.pipeline.grpc_link import GrpcLink, PipelineSettings
from mdi.pipeline.link import Deliver, Link
from mdi.pipeline.stage import Stage
