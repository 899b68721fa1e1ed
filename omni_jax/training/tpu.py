"""What the TPU compiler is told beyond its defaults."""

from __future__ import annotations

COMPILER_OPTIONS: dict[str, str] = {
    # the products of the MLPs get tiles that keep the matrix units busy; by default a fusion may hold 16 MiB
    "xla_tpu_scoped_vmem_limit_kib": "98304",
    # all-gathers of parameters run beside computing; without these, v5p and v6e wait for each
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
