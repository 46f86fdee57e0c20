"""The planner: what it reads from a compiled module, what it refuses; and a compilation."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from configs import default, quickstart
from mambaout_jax.errors import UserError
from mambaout_jax.planning import plan, topology
from mambaout_jax.planning.program import Kernel, Operation, lower_step, read_program
from mambaout_jax.planning.schedule import count_cycles
from mambaout_jax.runtime.sharding import make_mesh

# Cut from a step that libtpu 0.0.52 compiled for v5e.
MODULE = """\
HloModule jit_train_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%limit (state: (s32[], f32[64,10])) -> pred[] {
  %constant.13 = s32[]{:T(128)} constant(13), metadata={op_name="jit(f)/jvp()" stack_frame_id=18}
  ROOT %lt.8 = pred[]{:T(512)} compare(%counter, %constant.13), direction=LT, metadata={op_name="jit(train_step)/ssm/while/cond/lt"}
}

%chunk (state: (s32[], f32[64,10])) -> (s32[], f32[64,10]) {
  %fusion.9 = f32[64,10]{1,0:T(8,128)} fusion(%state), kind=kLoop, calls=%h, backend_config={"estimated_cycles":"10"}
}

%body (state: (s32[], f32[64,10])) -> (s32[], f32[64,10]) {
  %all-gather.3 = f32[64]{0:T(64)} all-gather(%shard), channel_id=3, dimensions={0}
  %fusion.8 = f32[64,10]{1,0:T(8,128)} fusion(%state), kind=kLoop, calls=%g, backend_config={"estimated_cycles":"100"}
}

ENTRY %main (p: f32[64,10], q: f32[1024]) -> f32[] {
  %p.1 = f32[64,10]{1,0:T(8,128)} parameter(0)
  %q.1 = f32[1024]{0:T(1024)S(1)} parameter(1)
  %fusion.7 = f32[64,10]{1,0:T(8,128)} fusion(%p.1), kind=kLoop, calls=%f, metadata={op_name="jit(train_step)/stages_0/blocks_0/fc2/dot_general"}, backend_config={"estimated_cycles":"3791"}
  %depthwise_convolution.4 = bf16[8,8,16,48]{3,2,1,0:T(8,128)(2,1)} custom-call(%a, %b), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[8,8,16,48]{3,2,1,0}, f32[49,48]{1,0}}
  %depthwise_convolution.5 = bf16[8,8,16,48]{3,2,1,0:T(8,128)(2,1)} custom-call(%a, %b), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[8,8,16,48]{3,2,1,0}, f32[49,48]{1,0}}
  %all-reduce.1 = (f32[64,10]{1,0:T(8,128)}, f32[1024]{0:T(1024)S(1)}) all-reduce(%fusion.7, %q.1), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %all-gather-start = (f32[1024]{0:T(1024)}, f32[8192]{0:T(1024)}) all-gather-start(%q.1), channel_id=2, dimensions={0}
  %while.1 = (s32[], f32[64,10]) while(%tuple), condition=%condition, body=%body, metadata={op_name="jit(train_step)/while" stack_frame_id=150}
  %while.2 = (s32[], f32[64,10]) while(%tuple.2), condition=%limit, body=%chunk, metadata={op_name="jit(train_step)/ssm/while" stack_frame_id=24}
  ROOT %copy.1 = f32[]{:T(128)} copy(%c), backend_config={"estimated_cycles":"20"}
}
"""  # noqa: E501

# Ten bundles: a loop of two, with the four that its branch delays, runs 5 times.
SCHEDULE = """\
0x0   :  { %s1 = smov 0 }
0x1 LB: > { %s2 = sphi %s1 }
0x2   : > { %p3 = scmp.ge.s32.totalorder %s2, 5 /* loop exit test */ }
       sbr.rel (!%p3)
0x3   : > { nop }
0x4   : > { nop }
0x5   : > { nop }
0x6   : > { nop }
0x7   :  { nop }
0x8   :  { nop }
0x9   :  { nop }
"""


def test_a_module_is_read():
    program = read_program(MODULE, parts=4)
    operands = (("bf16", (8, 8, 16, 48)), ("f32", (49, 48)))
    size = 2 * (2 * 8 * 8 * 16 * 128) + 4 * 49 * 128  # rows of 48 channels take 128 lanes
    kernel = Kernel("depthwise_convolution", operands, size)
    assert program.operations == (
        Operation(3791, "fusion.7", "jit(train_step)/stages_0/blocks_0/fc2/dot_general"),
        Operation(20, "copy.1", ""),
        Operation(4 * 100, "fusion.8", ""),
        Operation(13 * 10, "fusion.9", ""),
    )
    assert program.kernels == {kernel: 2}
    assert program.collectives == {
        "all-reduce": (1, 4 * (640 + 1024)),
        "all-gather": (1 + 4, 4 * 8192 + 4 * 4 * 64),
    }


def test_the_step_has_the_loop_over_parts_that_a_module_is_read_by():
    config = quickstart.get_config()
    config.batch_size, config.accumulate_steps, config.model.depthwise = 32, 2, "xla"
    text = lower_step(config, make_mesh(), steps_per_epoch=10).as_text(debug_info=True)
    assert '"jit(train_step)/while"' in text


def test_a_schedule_is_counted():
    assert count_cycles(SCHEDULE) == 4 + 5 * 6
    with pytest.raises(ValueError, match="constant trips"):
        count_cycles(SCHEDULE.replace("%s2, 5", "%s2, %s9"))


def test_memory_that_does_not_suffice_is_explained():
    config = default.get_config()
    error = RuntimeError(
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (33.50G) exceeds available HBM (15.75G). HLO module: jit."
    )
    explained = plan._too_large(error, config, "v5e:2x4", 8)
    assert isinstance(explained, UserError)
    assert "512 images per chip of v5e:2x4 need 33.50 GiB" in str(explained)
    assert "--config.accumulate_steps=4" in str(explained)
    other = RuntimeError("INTERNAL: Mosaic failed")
    assert plan._too_large(other, config, "v5e:2x4", 8) is other


def test_an_unknown_topology_names_the_known_ones():
    command = [sys.executable, "tools/plan_tpu.py", "--config=configs/tiny.py"]
    done = subprocess.run(
        [*command, "--topology=v5e:2x3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown topology 'v5e:2x3': known are v4:{1x1x1,")
    assert "v5e:{1x1,2x2,2x4,4x4,4x8,8x8,8x16,16x16}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_compiler_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mambaout_jax\[plan\]'"):
        topology.load_compiler()


PLAN = """
import json
from configs import quickstart
from mambaout_jax.errors import UserError
from mambaout_jax.planning.plan import describe, make_plan
from mambaout_jax.planning.topology import load_compiler
load_compiler()
config = quickstart.get_config()
refused = []
for change in ({"batch_size": 12}, {"mesh": {"fsdp": 3}}):
    with config.unlocked():
        bad = config.copy_and_resolve_references()
        bad.update(change)
    try:
        make_plan(bad, "v5e:2x4", 1437)
    except UserError as error:
        refused.append(str(error))
config.model.name, config.batch_size = "test_mambaout", 64
made = make_plan(config, "v5e:2x4", 1437)
config.batch_size = 24
few = make_plan(config, "v5e:2x4", 1437)
print(json.dumps([refused, made.chips, made.images, made.counted, made.estimated,
                  made.memory.peak, made.program.collectives, describe(made, price=1e6),
                  made.total_steps * made.step, [few.images, few.counted, few.estimated]]))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_step_compiles_for_a_slice():
    # In a process of its own: libtpu reads its flags once, and holds what it loads.
    command = [sys.executable, "-c", PLAN]
    environment = os.environ | {"XLA_FLAGS": ""}  # libtpu does not know the CPU's flags
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    refused, chips, images, counted, estimated, peak, collectives, text, seconds, few = json.loads(
        done.stdout.splitlines()[-1]
    )
    assert few[:2] == [3, 0]  # images a chip, and cycles of our kernels, which pay from 8 images
    assert few[2] > 0
    assert refused[0].startswith("config.batch_size 12 does not divide over 8 devices")
    assert refused[1] == "config.mesh.fsdp 3 does not divide the 8 devices"
    assert (chips, images) == (8, 8)
    assert counted > 0
    assert estimated > 0
    assert 0 < peak < 2**30
    assert collectives["all-reduce"][1] > 700_000  # every gradient, in float32
    assert "images/s" in text
    cost = re.search(r"chip hours, ([\d,]+) at 1000000.0 each", text).group(1)
    assert int(cost.replace(",", "")) == pytest.approx(1e6 * 8 * seconds / 3600, abs=1)
