"""The installer behind `make install`: its pure parts and its decisions; nothing is installed."""

import ast
import dataclasses
import importlib.util
import io
import signal
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'tools' / 'setup_env.py'


@pytest.fixture(scope='module')
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location('setup_env', SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for what their annotations mean
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def env(setup_env: ModuleType, tmp_path: Path, screen: io.StringIO):
    """An empty environment whose Python is the one that runs the tests."""
    env = setup_env.Environment(tmp_path, setup_env.Console(screen), setup_env.STACKS['onedl'])
    env.python = Path(sys.executable)
    env.site_packages = tmp_path
    return env


def record(site_packages: Path, name: str, complete: bool = True) -> Path:
    info = site_packages / f'{name}.dist-info'
    info.mkdir(parents=True)
    (info / 'METADATA').touch()
    if complete:
        (info / 'RECORD').touch()
    return info


def test_old_pythons_can_parse_it() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 7))


@pytest.mark.parametrize('version', [(3, 10, 0), (3, 11, 7), (3, 12, 1)])
def test_supported_pythons(setup_env: ModuleType, version: tuple[int, ...]) -> None:
    assert setup_env.python_problem(version, 'python3', setup_env.STACKS['onedl']) is None


@pytest.mark.parametrize('version', [(2, 7, 18), (3, 9, 20), (3, 13, 0)])
def test_other_pythons_are_named(setup_env: ModuleType, version: tuple[int, ...]) -> None:
    problem = setup_env.python_problem(version, '/usr/bin/python3', setup_env.STACKS['onedl'])
    assert '3.10 to 3.12' in problem
    assert f'/usr/bin/python3 is Python {".".join(map(str, version))}' in problem
    assert '\n' not in problem


@pytest.mark.parametrize(
    ('log', 'progress'),
    [
        ('', None),
        ('  Running command Building wheel\n  copying [1/2] a.py\n', None),
        ('  [1/78] c++ -MMD\n', (1, 78)),
        ('  [1/78] c++ a\nwarning: b\n  [57/78] c++ c\n     57 | [99/99] d\n', (57, 78)),
    ],
)
def test_compile_progress(setup_env: ModuleType, log: str, progress: object) -> None:
    assert setup_env.compile_progress(log) == progress


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0.4, '0 s'), (59.9, '59 s'), (61, '1 min'), (359, '6 min'), (3600, '1 h 0 min')],
)
def test_duration(setup_env: ModuleType, seconds: float, text: str) -> None:
    assert setup_env.duration(seconds) == text


def test_compile_status(setup_env: ModuleType) -> None:
    describe = setup_env.CompileStatus('a.log')
    assert describe('Collecting', 30) == 'preparing mmcv: 30 s gone (log: a.log)'
    # The estimate leaves out the 30 s before the compiler started: 20 files took 300 s.
    output = 'Collecting\n  running build_ext\n'
    assert describe(output, 31).startswith('preparing')
    output += '  [20/80] c++ a.cpp\n'
    assert describe(output, 330) == (
        'compiling mmcv: 20/80 files, 6 min gone, about 15 min left (log: a.log)'
    )
    output += '  [80/80] c++ -shared\n'
    assert describe(output, 1200) == (
        'compiling mmcv: 80/80 files, 20 min gone, packing it (log: a.log)'
    )


@pytest.mark.parametrize(('cores', 'gib', 'jobs'), [(2, 24, 2), (64, 16, 8), (8, 1, 1), (1, 64, 1)])
def test_compile_jobs(setup_env: ModuleType, cores: int, gib: int, jobs: int) -> None:
    assert setup_env.compile_jobs(cores, gib << 30) == jobs


def test_pinned(setup_env: ModuleType) -> None:
    text = 'onedl-mmcv==2.3.6\nscipy==1.15.3; python_version < "3.11"\n'
    assert setup_env.pinned('onedl-mmcv', text) == '2.3.6'
    with pytest.raises(setup_env.Problem, match='does not pin mmcv'):
        setup_env.pinned('mmcv', text)
    for stack in setup_env.STACKS.values():
        for name in ('torch', 'numpy', stack.mmcv or 'mmengine'):
            assert setup_env.pinned(name, stack.constraints.read_text())


def test_the_oldest_torch_is_the_one_that_is_promised(setup_env: ModuleType) -> None:
    pins = setup_env.STACKS['oldest'].constraints.read_text()
    oldest = setup_env.pinned('torch', pins).rpartition('.')[0]
    assert f"'torch>={oldest}'" in (ROOT / 'setup.py').read_text()
    assert f'torch (>= {oldest})' in (ROOT / 'README.md').read_text()


def test_installed_and_half_installed(setup_env: ModuleType, tmp_path: Path) -> None:
    record(tmp_path, 'onedl_mmcv-2.3.6')
    half = record(tmp_path, 'Jinja2-3.1.6', complete=False)
    assert setup_env.installed(tmp_path) == {'onedl-mmcv': '2.3.6', 'jinja2': '3.1.6'}
    assert setup_env.forget_half_installed(tmp_path) == ['Jinja2-3.1.6']
    assert not half.exists()
    assert setup_env.forget_half_installed(tmp_path) == []
    assert setup_env.installed(tmp_path) == {'onedl-mmcv': '2.3.6'}


def test_fingerprint(setup_env: ModuleType, tmp_path: Path) -> None:
    a, b = tmp_path / 'a', tmp_path / 'b'
    a.write_text('1')
    b.write_text('2')
    first = setup_env.fingerprint([a, b], 'venv')
    assert setup_env.fingerprint([a, b], 'venv') == first
    assert setup_env.fingerprint([a, b], 'elsewhere') != first
    b.write_text('3')
    assert setup_env.fingerprint([a, b], 'venv') != first


def test_status_without_a_terminal(
    setup_env: ModuleType, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(setup_env.time, 'monotonic', lambda: now)
    console = setup_env.Console(screen)
    # The clock reads `now`.
    for now in range(100):
        console.status(f'{now} s')
    assert screen.getvalue() == '30 s\n60 s\n90 s\n'


def test_status_on_a_terminal(
    setup_env: ModuleType, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, 'isatty', lambda: True)
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setenv('COLUMNS', '20')
    console = setup_env.Console(screen)
    console.status('x' * 50)
    console.line('done')
    assert screen.getvalue() == f'\r\033[K{"x" * 19}\r\033[Kdone\n'


def test_run_keeps_the_output_in_a_log(env, screen: io.StringIO) -> None:
    seen: list[str] = []

    def status(output: str, gone: float) -> str:
        seen.append(output)
        return ''

    code = 'import time; print("one", flush=True); time.sleep(2); print("two")'
    env.log.write_text('before\n')
    seconds, output = env.run([sys.executable, '-c', code], status, env.log)
    assert output == 'one\ntwo\n'
    assert 'one\n' in seen
    assert 2 < seconds < 60
    assert env.log.read_text().startswith('before\n\n$ ')
    assert env.log.read_text().endswith('one\ntwo\n')
    assert screen.getvalue() == ''


def test_failure_shows_the_end_of_the_log(setup_env: ModuleType, env, screen: io.StringIO) -> None:
    code = 'print(*range(100), sep="\\n"); raise SystemExit(3)'
    with pytest.raises(setup_env.Problem, match='exit status 3 from') as caught:
        env.take('step', [sys.executable, '-c', code])
    assert str(env.log) in str(caught.value)
    assert caught.value.code == 1
    assert screen.getvalue().split() == [str(number) for number in range(70, 100)]


def test_stopping_takes_the_command_down(env) -> None:
    def stop(output: str, gone: float) -> str:
        if not output:
            return ''
        raise KeyboardInterrupt

    code = (
        'import subprocess, sys, time\n'
        'child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])\n'
        'print(child.pid, flush=True)\n'
        'time.sleep(600)\n'
    )
    with pytest.raises(KeyboardInterrupt):
        env.run([sys.executable, '-c', code], stop, env.log)
    grandchild = int(env.log.read_text().split()[-1])
    deadline = time.monotonic() + 30
    while psutil.pid_exists(grandchild) and time.monotonic() < deadline:
        if psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE:
            return  # dead, and its new parent does not look
        time.sleep(0.1)
    assert not psutil.pid_exists(grandchild)


def test_probe(env) -> None:
    assert env.probe('pass') is None
    assert env.probe('raise ValueError("wrong torch")') == 'ValueError: wrong torch'
    assert env.probe('import os, signal; os.kill(os.getpid(), signal.SIGSEGV)') == (
        'it died of SIGSEGV'
    )
    assert env.probe('raise SystemExit(4)') == 'exit status 4'


def test_operators_of_the_mmcv_that_is_here(setup_env: ModuleType, env) -> None:
    pytest.importorskip('mmcv')
    assert env.probe(setup_env.CHECK_OPS) is None
    wrong = setup_env.CHECK_OPS.replace('1.25', '1.26')
    assert env.probe(wrong).startswith('RoIAlign on cpu is [1.0, 1.25, 1.5, 1.75], not')


class TestInstallMmcv:
    """Which mmcv gets installed, and how, by what its operators do."""

    @pytest.fixture
    def calls(
        self, setup_env: ModuleType, env, monkeypatch: pytest.MonkeyPatch
    ) -> list[tuple[str, ...]]:
        calls: list[tuple[str, ...]] = []
        monkeypatch.setattr(env, 'pip', lambda step, *arguments: calls.append(arguments))
        monkeypatch.setattr(
            setup_env, 'forget_kept_wheel', lambda env, version: calls.append(('forget', version))
        )
        return calls

    def build(self, setup_env, monkeypatch, calls, compiled: list[bool], runs: list[bool]) -> None:
        """Have builds be compiled or not, and the operators run or not, in turn."""

        def build_mmcv(env, *arguments: str) -> bool:
            calls.append(('build', *arguments))
            return compiled.pop(0)

        def probe(self, code: str) -> str | None:
            if code == setup_env.CHECK_CUDA:
                return None
            return None if runs.pop(0) else 'undefined symbol'

        monkeypatch.setattr(setup_env, 'build_mmcv', build_mmcv)
        monkeypatch.setattr(setup_env.Environment, 'probe', probe)

    @pytest.fixture
    def version(self, setup_env: ModuleType) -> str:
        return setup_env.pinned('onedl-mmcv', (ROOT / 'constraints.txt').read_text())

    def test_there_and_running(self, setup_env, env, calls, version, monkeypatch) -> None:
        record(env.site_packages, f'onedl_mmcv-{version}')
        self.build(setup_env, monkeypatch, calls, [], [True])
        setup_env.install_mmcv(env)
        assert calls == []

    def test_fresh(self, setup_env, env, calls, monkeypatch) -> None:
        self.build(setup_env, monkeypatch, calls, [True], [True])
        setup_env.install_mmcv(env)
        assert calls == [('build',)]

    def test_there_and_broken(self, setup_env, env, calls, version, monkeypatch, screen) -> None:
        record(env.site_packages, f'onedl_mmcv-{version}')
        self.build(setup_env, monkeypatch, calls, [False], [False, True])
        setup_env.install_mmcv(env)
        assert calls == [('uninstall', '-y', 'onedl-mmcv'), ('build',)]
        assert 'its operators do not run (undefined symbol)' in screen.getvalue()

    def test_kept_wheel_of_another_torch(
        self, setup_env, env, calls, version, monkeypatch, screen
    ) -> None:
        self.build(setup_env, monkeypatch, calls, [False, True], [False, True])
        setup_env.install_mmcv(env)
        assert calls == [
            ('build',),
            ('uninstall', '-y', 'onedl-mmcv'),
            ('forget', version),
            ('build', '--no-binary', 'onedl-mmcv'),
        ]
        assert 'compiled against another torch' in screen.getvalue()

    def test_compiled_and_still_broken(self, setup_env, env, calls, monkeypatch) -> None:
        self.build(setup_env, monkeypatch, calls, [True], [False])
        with pytest.raises(setup_env.Problem, match='do not run: undefined symbol'):
            setup_env.install_mmcv(env)
        assert calls == [('build',)]


class TestOldest:
    """The small environment: torch and numpy alone, MMEngine where PYTHONPATH names its folder."""

    def test_steps(self, setup_env, env, monkeypatch, screen) -> None:
        env.stack = setup_env.STACKS['oldest']
        calls: list[tuple[str, ...]] = []
        monkeypatch.setattr(env, 'pip', lambda step, *arguments: calls.append(arguments) or 61.0)
        before = env.path / 'with-mmengine' / 'mmengine'
        before.mkdir(parents=True)
        setup_env.install_oldest_torch(env)
        folder = setup_env.install_mmengine_apart(env)
        assert folder == before.parent and not folder.exists()
        assert all(('-c', str(env.stack.constraints)) == call[2:4] for call in calls)
        torch, mmlavit, mmengine, cv2 = (call[4:] for call in calls)
        assert {'torch', 'numpy', 'pytest'} < set(torch) and mmlavit == ('-e', '.')
        assert mmengine == ('--target', str(folder), 'mmengine')
        assert cv2[:2] == ('--target', str(folder)) and 'opencv-python-headless' in cv2
        assert not {'mmcv', 'mmengine'} & {*torch, *mmlavit}
        assert screen.getvalue().splitlines() == [
            '[2/4] torch, the test tools and mmlavit: 2 min',
            '[3/4] MMEngine, in a folder of its own: 2 min',
        ]

    @pytest.fixture
    def unfit(self, setup_env, monkeypatch, tmp_path) -> Path:
        """Whatever Python runs the tests, the stacks want 3.98 or 3.99; the only folder of PATH."""
        for name, stack in setup_env.STACKS.items():
            newer = dataclasses.replace(stack, pythons=((3, 98), (3, 99)))
            monkeypatch.setitem(setup_env.STACKS, name, newer)
        folder = tmp_path / 'bin'
        folder.mkdir()
        monkeypatch.setenv('PATH', str(folder))
        return folder

    def python(self, folder: Path, minor: int, works: bool = True) -> str:
        file = folder / f'python3.{minor}'
        file.write_text(f'#!/bin/sh\nexit {0 if works else 127}\n')
        file.chmod(0o755)
        return str(file)

    def test_finds_a_python_that_will_do(self, setup_env, unfit) -> None:
        stack = setup_env.STACKS['oldest']
        older = self.python(unfit, 98)
        self.python(unfit, 97)
        assert setup_env.find_python(stack) == older
        self.python(unfit, 99, works=False)
        assert setup_env.find_python(stack) == older
        newer = self.python(unfit, 99)
        assert setup_env.find_python(stack) == newer
        # The others are made by the Python that the user chose.
        with pytest.raises(setup_env.Problem, match='choose another'):
            setup_env.find_python(setup_env.STACKS['onedl'])

    def test_is_skipped_in_one_line(self, setup_env, unfit, tmp_path, capsys) -> None:
        ask = ['--stack', 'oldest', '--venv', str(tmp_path / 'env'), '--has-python']
        assert setup_env.main(ask) == 2
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f'{tmp_path}/env and its tests are skipped: Python 3.98 to 3.99')
        assert not (tmp_path / 'env').exists()
        self.python(unfit, 99)
        assert setup_env.main(ask) == 0
        assert capsys.readouterr().out == ''


class TestMain:
    """What the user reads, and the exit code."""

    @pytest.fixture(autouse=True)
    def _signals(self) -> Iterator[None]:
        """Take back the handlers that main() sets."""
        kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        yield
        for number, handler in kept.items():
            signal.signal(number, handler)

    def test_nothing_to_do(self, setup_env, tmp_path, capsys) -> None:
        (tmp_path / 'bin').mkdir()
        (tmp_path / 'bin' / 'python').touch()
        recipe = [setup_env.STACKS['onedl'].constraints, ROOT / 'setup.py', SCRIPT]
        stamp = setup_env.fingerprint(recipe, str(ROOT), str(tmp_path))
        (tmp_path / '.mmlavit-installed').write_text(stamp)
        assert setup_env.main(['--venv', str(tmp_path)]) == 0
        assert capsys.readouterr().out == f'{tmp_path} is up to date\n'

    def fails(self, setup_env, tmp_path, capsys) -> str:
        """The one line that it fails with."""
        assert setup_env.main(['--venv', str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    def test_unsupported_python(self, setup_env, tmp_path, capsys, monkeypatch) -> None:
        stack = dataclasses.replace(setup_env.STACKS['onedl'], pythons=((3, 98), (3, 99)))
        monkeypatch.setitem(setup_env.STACKS, 'onedl', stack)
        line = self.fails(setup_env, tmp_path, capsys)
        found = '.'.join(map(str, sys.version_info[:3]))
        assert f'Python 3.98 to 3.99 is needed, and {sys.executable} is Python {found}' in line

    def test_original_names_in_the_environment(self, setup_env, tmp_path, capsys) -> None:
        venv.create(tmp_path)
        site_packages = next(tmp_path.glob('lib/python3.*/site-packages'))
        record(site_packages, 'mmcv-2.1.0')
        record(site_packages, 'mmengine-0.10.7')
        line = self.fails(setup_env, tmp_path, capsys)
        assert f'{tmp_path} holds mmcv, mmengine' in line
        assert 'VENV=' in line

    def test_each_family_refuses_the_other(self, setup_env, tmp_path, capsys, monkeypatch) -> None:
        # Whatever Python runs the tests.
        both = dataclasses.replace(setup_env.STACKS['openmmlab'], pythons=((3, 10), (3, 12)))
        monkeypatch.setitem(setup_env.STACKS, 'openmmlab', both)
        onedl, openmmlab, oldest = setup_env.STACKS.values()
        assert onedl.rivals == openmmlab.toolboxes and openmmlab.rivals == onedl.toolboxes
        assert oldest.rivals == onedl.toolboxes | openmmlab.toolboxes
        venv.create(tmp_path)
        record(next(tmp_path.glob('lib/python3.*/site-packages')), 'onedl_mmengine-0.10.12')
        assert setup_env.main(['--venv', str(tmp_path), '--stack', 'openmmlab']) == 2
        assert 'holds onedl-mmengine' in capsys.readouterr().err
        alone = dataclasses.replace(oldest, pythons=both.pythons)
        monkeypatch.setitem(setup_env.STACKS, 'oldest', alone)
        assert setup_env.main(['--venv', str(tmp_path), '--stack', 'oldest']) == 2
        assert 'is to hold nothing of OpenMMLab' in capsys.readouterr().err

    def test_no_compiler(self, setup_env, tmp_path, capsys, monkeypatch) -> None:
        venv.create(tmp_path, with_pip=True)
        monkeypatch.delenv('CXX', raising=False)
        monkeypatch.setattr(setup_env.shutil, 'which', lambda name: None)
        line = self.fails(setup_env, tmp_path, capsys)
        assert 'no C++ compiler (looked for c++, g++, clang++)' in line


def test_compiler_of_the_users_choice(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_env.shutil, 'which', lambda name: f'/usr/bin/{name}')
    monkeypatch.setenv('CXX', 'ccache g++-13')
    assert setup_env.find_compiler() == 'ccache g++-13'
    monkeypatch.delenv('CXX')
    assert setup_env.find_compiler() == 'c++'
