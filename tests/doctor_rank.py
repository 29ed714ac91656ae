"""One rank of `tubelet doctor` on a host with something wrong: `python doctor_rank.py FAULT,FAULT WORDS...`."""

import os
import sys
import time


def other_version(doctor):
    look = doctor.versions.look

    def looks():
        found = look()
        found["versions"] |= {"torch": "9.9.9", "numpy": "0.0.1"}
        found["sources"] |= {"tubelet/dist.py": "another"}
        return found

    doctor.versions.look = looks


def clock_ahead(doctor):
    doctor.machine.clock = lambda: time.time() + 7


def slow_device(doctor):
    measure = doctor.speeds.measure

    def measures(*args):
        found = measure(*args)
        return {**found, "tflops": found["tflops"] / 1000}

    doctor.speeds.measure = measures


def small_limits(doctor):
    look = doctor.machine.look
    doctor.machine.look = lambda: {**look(), "shm": 64 * 2**20, "open_files": 100.0}


def chatty(doctor):
    look = doctor.look_around
    doctor.look_around = lambda world: (os.write(1, b"as C++ libraries do\n"), look(world))[1]


def dies(doctor):
    doctor.network.latency = lambda: os._exit(9)


def hangs(doctor):
    doctor.network.latency = lambda: time.sleep(600)


def deaf(doctor):
    real = doctor.listener
    doctor.listener = lambda address: (real(address)[0], 1)  # nobody listens at port 1


if __name__ == "__main__":
    from tubelet.console import run_app
    from tubelet.program.doctor import examine
    from tubelet.program.doctor.cli import app
    from tubelet.program.main import finish

    for name in sys.argv[1].split(","):
        if name != "well":
            globals()[name](examine)
    finish(run_app(app, [*sys.argv[2:], "--nproc=0"], "tubelet doctor"))
