#!/usr/bin/env python3
"""Install mmlavit and all that its tests and its demo need into a virtual environment.

`make install` runs this, on nothing but Python. It makes the environment, installs torch, compiles
MMCV against that torch (the long step; pip keeps the wheel for the next time), checks that MMCV's
compiled operators really run, and installs the toolboxes and mmlavit itself, everything at the
versions of the constraints file. It may be stopped at any point and run again: it goes on from the
step that it was in, and returns at once when there is nothing to do.

``--stack oldest`` makes a small environment instead, for `make test-oldest`: the oldest torch that
is supported and what pytest needs, and MMEngine in a folder of its own beside it, which tests see
only where PYTHONPATH names it. There nothing is compiled.

What pip reads from its configuration and its environment applies, such as PIP_EXTRA_INDEX_URL.
MAX_JOBS is how many files are compiled at once.
"""

# Kept to syntax that old Pythons parse, so that they get to say that they are too old.
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ['setuptools', 'wheel', 'packaging', 'ninja']
# What the tests of the oldest torch need beside it.
TEST_TOOLS = ['hypothesis', 'pytest', 'pytest-timeout', 'pytest-xdist']


@dataclasses.dataclass(frozen=True)
class Stack:
    """What an environment holds: one of the two families of OpenMMLab's distributions, or neither.

    Args:
        name: The extra of mmlavit that asks for it.
        constraints: The versions that were tried together.
        toolboxes: The distributions that own the import names of OpenMMLab.
        pythons: The first and the last Python that those versions exist for.
        mmcv: The one of them that is MMCV, or None where there is none.
    """

    name: str
    constraints: Path
    toolboxes: frozenset[str]
    pythons: tuple[tuple[int, int], tuple[int, int]]
    mmcv: str | None = None

    @property
    def rivals(self) -> frozenset[str]:
        """What must not be there: distributions that own the same files, or would be seen."""
        return frozenset().union(*(s.toolboxes for s in STACKS.values() if s != self))

    @property
    def steps(self) -> int:
        """How many an installation takes."""
        return 6 if self.mmcv else 4

    def step(self, number: int, what: str) -> str:
        """A step as people read it."""
        return f'[{number}/{self.steps}] {what}'


STACKS = {
    stack.name: stack
    for stack in (
        Stack(
            name='onedl',
            constraints=ROOT / 'constraints.txt',
            toolboxes=frozenset(
                f'onedl-{name}'
                for name in ('mmcv', 'mmengine', 'mmdetection', 'mmsegmentation', 'mmpretrain')
            ),
            pythons=((3, 10), (3, 12)),
            mmcv='onedl-mmcv',
        ),
        Stack(
            name='openmmlab',
            constraints=ROOT / 'constraints-openmmlab.txt',
            toolboxes=frozenset(
                ('mmcv', 'mmcv-full', 'mmcv-lite')
                + ('mmengine', 'mmdet', 'mmsegmentation', 'mmpretrain')
            ),
            pythons=((3, 11), (3, 11)),
            mmcv='mmcv',
        ),
        Stack(
            name='oldest',
            constraints=ROOT / 'constraints-openmmlab.txt',
            toolboxes=frozenset(),
            pythons=((3, 10), (3, 11)),
        ),
    )
}

HEARTBEAT = 30.0  # seconds between progress lines where they cannot be updated in place
LOG_TAIL = 30  # lines of a log to show after a failure
GIB_PER_JOB = 2  # memory that one compiler takes
USER_ERROR, FAILURE = 2, 1  # exit codes

DESCRIBE_PYTHON = """
import json, os, sys, sysconfig
header = os.path.join(sysconfig.get_path('include'), 'Python.h')
missing = None if os.path.exists(header) else header
print(json.dumps([sys.version_info[:3], sysconfig.get_path('purelib'), missing]))
"""

# The values are those of mmcv's own tests.
CHECK_OPS = """
import torch
from mmcv.ops import RoIAlign, nms

def check(device):
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]], device=device)
    _, kept = nms(boxes, torch.tensor([0.8, 0.9, 0.7], device=device), 0.5)
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], device=device, requires_grad=True)
    box = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]], device=device)
    pooled = RoIAlign((2, 2), 1.0, 2)(maps, box)
    pooled.sum().backward()
    for name, found, right in [
        ('nms', kept, [1, 2]),
        ('RoIAlign', pooled, [1.0, 1.25, 1.5, 1.75]),
        ('the gradient of RoIAlign', maps.grad, [3.0625, 0.4375, 0.4375, 0.0625]),
    ]:
        found = found.detach().cpu().float().flatten()
        right = torch.tensor(right, dtype=torch.float32)
        if found.shape != right.shape or not torch.allclose(found, right, atol=1e-5):
            raise SystemExit(f'{name} on {device} is {found.tolist()}, not {right.tolist()}')

check('cpu')
if torch.cuda.is_available():
    check('cuda')
"""

CHECK_CUDA = """
import torch
from torch.utils.cpp_extension import CUDA_HOME
if torch.cuda.is_available() and torch.version.hip is None and CUDA_HOME is None:
    raise SystemExit(
        f'torch sees a GPU, but there is no CUDA {torch.version.cuda} compiler for the operators '
        'of mmcv: install that CUDA toolkit and set CUDA_HOME, or set CUDA_VISIBLE_DEVICES= '
        '(empty) to install for the CPU and run on it'
    )
"""

CHECK_IMPORTS = """
import importlib
from mmlavit import compat
compat.repair_torchvision()
for name in ['mmcv.ops', 'mmdet.apis', 'mmseg.apis']:
    importlib.import_module(name)
names = 'torch torchvision mmengine mmcv mmdet mmseg mmpretrain mmlavit'.split()
print(', '.join(f'{name} {importlib.import_module(name).__version__}' for name in names))
"""

CHECK_OLDEST = """
import mmengine, mmlavit, numpy, torch
print(', '.join(f'{m.__name__} {m.__version__}' for m in (torch, numpy, mmengine, mmlavit)))
"""


class Problem(Exception):
    """Something to tell the user in one line, and the exit code that goes with it."""

    def __init__(self, message: str, code: int = USER_ERROR) -> None:
        super().__init__(message)
        self.code = code


# -- Pure parts ------------------------------------------------------------------------------------


def python_problem(version: tuple[int, ...], executable: str, stack: Stack) -> str | None:
    """Why this Python will not do, or None if it will."""
    first, last = stack.pythons
    if first <= tuple(version[:2]) <= last:
        return None
    found = '.'.join(map(str, version[:3]))
    span = f'{".".join(map(str, first))} to {".".join(map(str, last))}'
    return (
        f'Python {span} is needed, and {executable} is Python {found}; '
        'choose another, such as PYTHON=python3.11'
    )


def compile_progress(log: str) -> tuple[int, int] | None:
    """The last `[done/total]` that ninja wrote at the start of a line, or None."""
    found = re.findall(r'^\s*\[(\d+)/(\d+)\] ', log, re.MULTILINE)
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def duration(seconds: float) -> str:
    """A duration as people say it: 42 s, 6 min, 1 h 5 min."""
    if seconds < 60:
        return f'{int(seconds)} s'
    hours, minutes = divmod(round(seconds / 60), 60)
    return f'{hours} h {minutes} min' if hours else f'{minutes} min'


class CompileStatus:
    """Says how far the compilation is, with an estimate once there is something to go by."""

    def __init__(self, log: str) -> None:
        self.log = log
        self.prepared = 0.0

    def __call__(self, output: str, gone: float) -> str:
        """One line, from what pip has printed in the seconds that are gone."""
        progress = compile_progress(output)
        if 'running build_ext' not in output:
            self.prepared = gone
        if progress is None:
            return f'preparing mmcv: {duration(gone)} gone (log: {self.log})'
        done, total = progress
        line = f'compiling mmcv: {done}/{total} files, {duration(gone)} gone'
        if done == total:
            return f'{line}, packing it (log: {self.log})'
        left = max(1.0, (gone - self.prepared) * (total - done) / done)
        return f'{line}, about {duration(left)} left (log: {self.log})'


def compile_jobs(cores: int, memory: int) -> int:
    """How many files to compile at once: one per core, as far as the memory (in bytes) goes."""
    return max(1, min(cores, memory // (GIB_PER_JOB << 30)))


def pinned(name: str, constraints: str) -> str:
    """The version of a distribution in the text of a constraints file, the same on every Python."""
    found = re.search(rf'^{re.escape(name)}==(\S+)$', constraints, re.MULTILINE)
    if found is None:
        raise Problem(f'the constraints file does not pin {name}')
    return found.group(1)


def installed(site_packages: Path) -> dict[str, str]:
    """The distributions in a site-packages folder and their versions, from their records' names."""
    found = {}
    for info in site_packages.glob('*.dist-info'):
        name, _, version = info.name[: -len('.dist-info')].rpartition('-')
        found[re.sub(r'[-_.]+', '-', name).lower()] = version
    return found


def forget_half_installed(site_packages: Path) -> list[str]:
    """Make pip install again what an interrupted run left incomplete; the names.

    pip writes RECORD last. Without it a distribution passes for installed, yet may lack files.
    """
    names = []
    for info in sorted(site_packages.glob('*.dist-info')):
        if not (info / 'RECORD').exists():
            shutil.rmtree(info)
            names.append(info.name[: -len('.dist-info')])
    return names


def fingerprint(files: Iterable[Path], *facts: str) -> str:
    """A digest of all that decides what an installation looks like."""
    digest = hashlib.sha256()
    for part in [file.read_bytes() for file in files] + [fact.encode() for fact in facts]:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def last_line(text: str) -> str:
    """The last line that says anything, which in a traceback is the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ''


# -- The screen ------------------------------------------------------------------------------------


class Console:
    """Lines for the user, and a status that a terminal shows in place."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.live = stream.isatty() and os.environ.get('TERM') != 'dumb'
        self.last_line_at = time.monotonic()

    def line(self, text: str) -> None:
        """Print a line that stays."""
        start = '\r\033[K' if self.live else ''
        print(f'{start}{text}', file=self.stream, flush=True)
        self.last_line_at = time.monotonic()

    def status(self, text: str) -> None:
        """Show a passing state: in place on a terminal, elsewhere a line now and then."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f'\r\033[K{text[:width]}', end='', file=self.stream, flush=True)
        elif time.monotonic() - self.last_line_at >= HEARTBEAT:
            self.line(text)

    def clear(self) -> None:
        """Take the status off a terminal."""
        if self.live:
            print('\r\033[K', end='', file=self.stream, flush=True)


# -- The environment -------------------------------------------------------------------------------


class Environment:
    """A virtual environment, and commands that run in it with their output in a log."""

    def __init__(self, path: Path, console: Console, stack: Stack) -> None:
        self.path = path
        self.stack = stack
        self.console = console
        self.python = path / 'bin' / 'python'
        self.log = path / 'install.log'
        self.stamp = path / '.mmlavit-installed'
        self.site_packages = path / 'lib'  # until make_environment() has asked
        self.lock: IO[str] | None = None
        self.variables = dict(
            os.environ, PYTHONUNBUFFERED='1', PIP_DISABLE_PIP_VERSION_CHECK='1', PIP_NO_INPUT='1'
        )
        # Nothing from elsewhere may stand in for what is to be installed here.
        for name in ('PYTHONPATH', 'PYTHONHOME'):
            self.variables.pop(name, None)

    def shown(self, path: Path) -> str:
        """A path as short as it can be told from where the user is."""
        try:
            return str(path.relative_to(Path.cwd()))
        except ValueError:
            return str(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let in one installation at a time."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / '.install.lock', 'w') as self.lock:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                where = self.shown(self.path)
                self.console.line(f'another installation into {where} is at work; waiting for it')
                fcntl.flock(self.lock, fcntl.LOCK_EX)
            yield

    def probe(self, code: str) -> str | None:
        """Run code in the environment; None if that went well, otherwise why not in one line."""
        # From inside the environment: nothing gets imported by chance of the working directory.
        ran = subprocess.run(
            [str(self.python), '-W', 'ignore', '-c', code],
            cwd=self.path,
            env=self.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding='utf-8',
            errors='replace',
        )
        if ran.returncode == 0:
            return None
        if ran.returncode < 0:
            return f'it died of {signal.Signals(-ran.returncode).name}'
        return last_line(ran.stderr) or f'exit status {ran.returncode}'

    def run(
        self,
        command: list[str],
        status: Callable[[str, float], str],
        log: Path,
        **variables: str,
    ) -> tuple[float, str]:
        """Run a command to its end.

        Args:
            command: What to run, from the root of the repository.
            status: Makes the passing status from the output so far and the seconds gone.
            log: The file that its output is added to.
            **variables: Environment variables on top of the usual ones.

        Returns:
            The seconds that it took, and its output.

        Raises:
            Problem: It failed.
        """
        started = time.monotonic()
        output = ''
        with open(log, 'ab') as sink, open(log, encoding='utf-8', errors='replace') as source:
            sink.write(f'\n$ {" ".join(command)}\n'.encode())
            sink.flush()
            source.seek(sink.tell())
            # In a session of its own, so that stopping this program stops its compilers too. It
            # shares the lock, so that if this program is killed outright the next one waits.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=dict(self.variables, **variables),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[self.lock.fileno()] if self.lock else [],
            )
            try:
                while process.poll() is None:
                    self.console.status(status(output, time.monotonic() - started))
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=1)
                    output += source.read()
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                raise
            output += source.read()
        self.console.clear()
        if process.returncode != 0:
            for text in output.splitlines()[-LOG_TAIL:]:
                self.console.line(f'    {text}')
            raise Problem(
                f'exit status {process.returncode} from: {" ".join(command)} (whole log: '
                f'{self.shown(log)}; run again, this goes on from that step)',
                FAILURE,
            )
        return time.monotonic() - started, output

    def take(self, step: str, command: list[str], **variables: str) -> tuple[float, str]:
        """Run a command of which there is nothing to show but how long it has been running."""
        return self.run(command, lambda _, gone: f'{step}: {duration(gone)}', self.log, **variables)

    def pip(self, step: str, *arguments: str) -> float:
        """Run pip; the seconds that it took."""
        return self.take(step, [str(self.python), '-m', 'pip', *arguments])[0]

    def install(self, step: str, *arguments: str) -> float:
        """Run `pip install` at the versions that were tried; the seconds that it took."""
        constraints = ['-c', str(self.stack.constraints)]
        return self.pip(step, 'install', '--no-build-isolation', *constraints, *arguments)


# -- The steps -------------------------------------------------------------------------------------


def make_environment(env: Environment) -> None:
    """Make the environment, or see whether the one that is there will do."""
    where = env.shown(env.path)
    step = env.stack.step(1, where)
    if not env.python.exists():
        python = find_python(env.stack)
        try:
            env.take(step, [python, '-m', 'venv', str(env.path)])
        except Problem as error:
            raise Problem(
                f'{error}; on Debian and Ubuntu, venv is the package python3-venv', error.code
            ) from None
    asked = subprocess.run(
        [str(env.python), '-c', DESCRIBE_PYTHON],
        env=env.variables,
        capture_output=True,
        encoding='utf-8',
    )
    if asked.returncode != 0:
        raise Problem(f'{env.shown(env.python)} does not run; delete {where} and start again')
    version, purelib, missing_header = json.loads(asked.stdout)
    env.site_packages = Path(purelib)
    problem = python_problem(tuple(version), env.shown(env.python), env.stack)
    if problem:
        raise Problem(f'{problem} VENV=.venv-3.11')
    rivals = sorted(env.stack.rivals.intersection(installed(env.site_packages)))
    if rivals:
        why = (
            f'whose files the {env.stack.name} distributions would overwrite'
            if env.stack.mmcv
            else 'and is to hold nothing of OpenMMLab'
        )
        raise Problem(
            f'{where} holds {", ".join(rivals)}, {why}; choose another environment, such as '
            f'VENV=.venv-{env.stack.name}'
        )
    forgotten = forget_half_installed(env.site_packages)
    if env.probe('import pip'):
        env.take(step, [str(env.python), '-m', 'ensurepip'])
    again = f', interrupted and due again: {", ".join(forgotten)}' if forgotten else ''
    env.console.line(f'{step}: Python {".".join(map(str, version))}{again}')

    if env.stack.mmcv and env.stack.mmcv not in installed(env.site_packages):
        # Said before anything is downloaded.
        find_compiler()
        if missing_header:
            raise Problem(
                f'mmcv has to be compiled, and {missing_header} is missing; on Debian and Ubuntu '
                'it is in the package python3-dev'
            )


def find_python(stack: Stack) -> str:
    """The Python to make an environment with: this one, or for the oldest torch another on PATH.

    Raises:
        Problem: There is none.
    """
    problem = python_problem(tuple(sys.version_info), sys.executable, stack)
    if problem is None:
        return sys.executable
    (major, first), (_, last) = stack.pythons
    for minor in range(last, first - 1, -1) if stack.mmcv is None else ():
        found = shutil.which(f'python{major}.{minor}')
        # A name may lead nowhere, as pyenv's do, and Debian has Pythons that make no environments.
        command = [found or '', '-c', 'import ensurepip, venv']
        if found and subprocess.run(command, capture_output=True).returncode == 0:
            return found
    raise Problem(problem)


def find_compiler() -> str:
    """The C++ compiler that will compile mmcv."""
    candidates = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++', 'clang++']
    for candidate in candidates:
        if shutil.which(candidate.split()[0]):
            return candidate
    raise Problem(
        f'mmcv has to be compiled, and there is no C++ compiler (looked for '
        f'{", ".join(candidates)}); on Debian and Ubuntu, install the package g++'
    )


def install_torch(env: Environment) -> None:
    """Install what the compilation needs, and OpenCV in the right order."""
    step = env.stack.step(2, 'torch and the build tools')
    seconds = env.install(step, *BUILD_TOOLS, 'torch', 'numpy', 'opencv-python')
    # Both own cv2/, and the toolboxes ask for both. Coming last, the headless one's files stay:
    # they work on machines without display libraries, too.
    seconds += env.install(step, 'opencv-python-headless')
    env.console.line(f'{step}: {duration(seconds)}')


def install_mmcv(env: Environment) -> None:
    """Install mmcv such that its compiled operators run.

    pip keeps the wheel that it compiled once and does not know which torch that was for. So the
    operators are tried, and a kept wheel that fails is thrown away and compiled anew.
    """
    step = env.stack.step(3, 'mmcv')
    mmcv = env.stack.mmcv
    version = pinned(mmcv, env.stack.constraints.read_text(encoding='utf-8'))
    if installed(env.site_packages).get(mmcv) == version:
        env.console.status(f'{step}: trying its operators')
        problem = env.probe(CHECK_OPS)
        if problem is None:
            env.console.line(f'{step}: there already, and its operators run')
            return
        env.console.line(f'{step}: its operators do not run ({problem}); installing it again')
        env.pip(step, 'uninstall', '-y', mmcv)
    problem = env.probe(CHECK_CUDA)
    if problem:
        raise Problem(problem)

    compiled = build_mmcv(env)
    problem = env.probe(CHECK_OPS)
    if problem and not compiled:
        env.console.line(
            f'{step}: its operators do not run ({problem}): the wheel that pip had was compiled '
            'against another torch; compiling it anew'
        )
        env.pip(step, 'uninstall', '-y', mmcv)
        forget_kept_wheel(env, version)
        build_mmcv(env, '--no-binary', mmcv)
        problem = env.probe(CHECK_OPS)
    if problem:
        raise Problem(f'mmcv is installed, but its operators do not run: {problem}', FAILURE)
    env.console.line(f'{step}: its operators run')


def build_mmcv(env: Environment, *arguments: str) -> bool:
    """Install mmcv; True if it was compiled for that, False if pip had a wheel of it."""
    log = env.path / 'mmcv-build.log'
    describe = CompileStatus(env.shown(log))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    jobs = os.environ.get('MAX_JOBS') or str(compile_jobs(cores or 1, memory))
    # -v makes pip pass on what ninja says.
    command = [str(env.python), '-m', 'pip', 'install', '-v', '--no-build-isolation']
    seconds, output = env.run(
        [*command, '-c', str(env.stack.constraints), *arguments, env.stack.mmcv],
        lambda output, gone: env.stack.step(3, describe(output, gone)),
        log,
        CXX=find_compiler(),
        MAX_JOBS=jobs,
    )
    compiled = compile_progress(output) is not None
    how = 'compiled' if compiled else 'from a wheel that pip had'
    env.console.line(f'{env.stack.step(3, "mmcv")}: {how}, {duration(seconds)}')
    return compiled


def forget_kept_wheel(env: Environment, version: str) -> None:
    """Take this Python's mmcv wheel out of pip's cache, where every later run would find it."""
    python_tag = 'cp' + re.sub(r'\D', '', env.site_packages.parent.name)
    pattern = f'{env.stack.mmcv.replace("-", "_")}-{version}-{python_tag}*'
    with open(env.log, 'a', encoding='utf-8') as sink:
        # pip takes it for an error when there is no such wheel, or no cache.
        subprocess.run(
            [str(env.python), '-m', 'pip', 'cache', 'remove', pattern],
            env=env.variables,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )


def install_torchvision(env: Environment) -> None:
    """Install torchvision without its say in which torch: the one that is there stays."""
    step = env.stack.step(4, 'torchvision')
    env.console.line(f'{step}: {duration(env.install(step, "--no-deps", "torchvision"))}')


def install_packages(env: Environment) -> None:
    """Install the toolboxes, the test tools, and mmlavit in such a way that edits take effect."""
    step = env.stack.step(5, 'the toolboxes, the test tools and mmlavit')
    env.console.line(f'{step}: {duration(env.install(step, "-e", f".[{env.stack.name},dev]"))}')


def check_imports(env: Environment, code: str, **variables: str) -> None:
    """Import everything once, and name the versions."""
    step = env.stack.step(env.stack.steps, 'importing everything')
    command = [str(env.python), '-W', 'ignore', '-c', code]
    _, output = env.take(step, command, **variables)
    env.console.line(f'{step}: {last_line(output)}')


def install_oldest_torch(env: Environment) -> None:
    """Install torch, numpy, mmlavit as a user gets it, and what runs its tests."""
    step = env.stack.step(2, 'torch, the test tools and mmlavit')
    seconds = env.install(step, *BUILD_TOOLS, 'torch', 'numpy', *TEST_TOOLS)
    seconds += env.install(step, '-e', '.')
    env.console.line(f'{step}: {duration(seconds)}')


def install_mmengine_apart(env: Environment) -> Path:
    """Install MMEngine and what it needs into a folder; without it, it is not there.

    One environment so serves the tests without MMEngine and those with it: torch is large.
    """
    step = env.stack.step(3, 'MMEngine, in a folder of its own')
    folder = env.path / 'with-mmengine'
    shutil.rmtree(folder, ignore_errors=True)
    target = '--target', str(folder)
    seconds = env.install(step, *target, 'mmengine')
    # Over the one that MMEngine asks for, which wants display libraries.
    seconds += env.install(step, *target, '--upgrade', '--no-deps', 'opencv-python-headless')
    env.console.line(f'{step}: {duration(seconds)}')
    return folder


def install(env: Environment, force: bool) -> None:
    """Take the steps that are still to be taken."""
    recipe = [env.stack.constraints, ROOT / 'setup.py', Path(__file__)]
    wanted = fingerprint(recipe, str(ROOT), str(env.path))
    found = env.stamp.read_text(encoding='utf-8') if env.stamp.exists() else None
    if found == wanted and env.python.exists() and not force:
        env.console.line(f'{env.shown(env.path)} is up to date')
        return
    if found is not None:
        env.stamp.unlink()
    started = time.monotonic()
    make_environment(env)
    if env.stack.mmcv:
        install_torch(env)
        install_mmcv(env)
        install_torchvision(env)
        install_packages(env)
        check_imports(env, CHECK_IMPORTS)
    else:
        install_oldest_torch(env)
        folder = install_mmengine_apart(env)
        check_imports(env, CHECK_OLDEST, PYTHONPATH=str(folder))
    env.stamp.write_text(wanted, encoding='utf-8')
    took = duration(time.monotonic() - started)
    env.console.line(f'{env.shown(env.path)} is ready, after {took}')


def main(arguments: list[str] | None = None) -> int:
    """Run the installer; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--venv', default='.venv', help='the environment (default: %(default)s)')
    parser.add_argument(
        '--stack',
        choices=STACKS,
        default='onedl',
        help='the maintained distributions, those of the original names, or the oldest torch with '
        'MMEngine alone (default: %(default)s)',
    )
    parser.add_argument(
        '--force', action='store_true', help='take every step again although nothing has changed'
    )
    parser.add_argument(
        '--has-python',
        action='store_true',
        help='install nothing; fail, saying what is skipped, if no Python can make the environment',
    )
    options = parser.parse_args(arguments)

    console = Console(sys.stdout)
    env = Environment(Path(options.venv).absolute(), console, STACKS[options.stack])
    if options.has_python:
        try:
            env.python.exists() or find_python(env.stack)
        except Problem as error:
            console.line(f'{env.shown(env.path)} and its tests are skipped: {error}')
            return error.code
        return 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    try:
        with env.locked():
            install(env, options.force)
    except Problem as error:
        console.clear()
        print(f'setup_env: {error}', file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        console.clear()
        print('setup_env: stopped; the same command goes on from that step', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
