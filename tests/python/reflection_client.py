#!/usr/bin/env python3
"""A client of vpmud that knows nothing but what server reflection tells it.

It starts two vpmud processes, asks the first for its services, builds every message from the descriptors that it gets,
and then creates, starts, watches, migrates and deletes a virtual machine. There is no generated code here and no
.proto file: what works here works from any language with gRPC.

    python3 -m venv .venv && .venv/bin/pip install -r tests/python/requirements.txt
    cargo build --bin vpmud
    .venv/bin/python tests/python/reflection_client.py --vpmud target/debug/vpmud

Exit code 0 if every step did what it should, 1 otherwise, with the step and the reason.
"""

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

READY_DEADLINE = 30.0
CALL_DEADLINE = 30.0
MIGRATION_DEADLINE = 120.0


class Failed(Exception):
    """A step that did not do what it should."""


class Daemon:
    """One vpmud process with a state directory of its own."""

    def __init__(self, vpmud, directory, name, options):
        self.name = name
        self.api = f"unix:{directory}/{name}.sock"
        self.peer = f"unix:{directory}/{name}-peer.sock"
        self.log = open(os.path.join(directory, f"{name}.log"), "w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [vpmud, "serve", "--state-dir", os.path.join(directory, name), "--listen", self.api]
            + ["--peer-listen", self.peer]
            + options,
            stdout=subprocess.PIPE,
            stderr=self.log,
            stdin=subprocess.DEVNULL,
        )
        line = self._first_line()
        ready = json.loads(line)
        if ready.get("ready") is not True:
            raise Failed(f"{name} did not get ready: {line!r}")

    def _first_line(self):
        readable, _, _ = select.select([self.process.stdout], [], [], READY_DEADLINE)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            self.log.seek(0)
            raise Failed(f"{self.name} wrote no ready line within {READY_DEADLINE} s; its log:\n{self.log.read()}")
        return line

    def stop(self):
        """SIGTERM, and SIGKILL for what does not end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()
        self.log.close()


class Host:
    """A host as seen through reflection."""

    def __init__(self, target):
        self.channel = grpc.insecure_channel(target, options=[("grpc.default_authority", "localhost")])
        grpc.channel_ready_future(self.channel).result(timeout=CALL_DEADLINE)
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = descriptor_pool.DescriptorPool(self.database)

    def services(self):
        return sorted(self.database.get_services())

    def message(self, full_name):
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(full_name))

    def method(self, service, name):
        descriptor = self.pool.FindServiceByName(service).FindMethodByName(name)
        if descriptor is None:
            raise Failed(f"{service} has no method {name}")
        return descriptor

    def call(self, service, method, /, **fields):
        """Calls a unary method, or starts a server stream."""
        descriptor = self.method(service, method)
        request = message_factory.GetMessageClass(descriptor.input_type)(**fields)
        answer = message_factory.GetMessageClass(descriptor.output_type)
        kind = self.channel.unary_stream if descriptor.server_streaming else self.channel.unary_unary
        rpc = kind(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        timeout = MIGRATION_DEADLINE if descriptor.server_streaming else CALL_DEADLINE
        return rpc(request, timeout=timeout)

    def wait(self, operation, deadline):
        """Waits for a long-running operation and unpacks its response."""
        until = time.monotonic() + deadline
        while not operation.done:
            if time.monotonic() > until:
                raise Failed(f"{operation.name} is not done after {deadline} s")
            operation = self.call("google.longrunning.Operations", "GetOperation", name=operation.name)
            if not operation.done:
                time.sleep(0.05)
        if operation.HasField("error"):
            raise Failed(f"{operation.name} failed: {operation.error.code} {operation.error.message}")
        return self.unpack(operation.response)

    def unpack(self, packed):
        message = self.message(packed.type_url.rsplit("/", 1)[-1])()
        message.ParseFromString(packed.value)
        return message

    def state(self, vm):
        """The observed state's name."""
        field = vm.DESCRIPTOR.fields_by_name["observed_state"]
        return field.enum_type.values_by_number[vm.observed_state].name


VMS = "vpmu.v1.VirtualMachinesService"
PMU = "vpmu.v1.PmuService"
MIGRATIONS = "vpmu.v1.MigrationsService"
NAME = "projects/default/virtualMachines/reflected"


def step(text):
    print(f"  {text}", flush=True)


def check(condition, what):
    if not condition:
        raise Failed(what)
    step(f"ok: {what}")


def counters(pmu):
    return {(vcpu.vcpu, counter.name): counter.value for vcpu in pmu.vcpus for counter in vcpu.counters}


def run(source, destination, peer):
    services = source.services()
    step(f"services by reflection: {', '.join(services)}")
    for service in (VMS, PMU, MIGRATIONS, "google.longrunning.Operations", "grpc.health.v1.Health"):
        check(service in services, f"{service} is offered")
    check(not [s for s in services if s.startswith("vpmu.worker.")], "workers' private service is not shown")

    health = source.call("grpc.health.v1.Health", "Check")
    check(health.status == 1, "health says SERVING")

    operation = source.call(
        VMS,
        "CreateVirtualMachine",
        parent="projects/default",
        virtual_machine_id="reflected",
        request_id=str(uuid.uuid4()),
        virtual_machine={
            "spec": {
                "vcpus": 1,
                "memory_bytes": 64 << 20,
                "probe": {"working_set_bytes": 1 << 20, "dirty_pages_per_second": 2000},
            }
        },
    )
    vm = source.wait(operation, CALL_DEADLINE)
    check(source.state(vm) == "STOPPED", "the machine is created, stopped")

    watch = source.call(VMS, "WatchVirtualMachines", name=NAME)
    first = next(watch)
    check(first.virtual_machine.name == NAME, "the watch begins with the machine")

    vm = source.wait(source.call(VMS, "StartVirtualMachine", name=NAME), CALL_DEADLINE)
    check(source.state(vm) == "RUNNING", f"it runs on {vm.hypervisor}, PMU mode {vm.pmu_mode}")
    for event in watch:
        if event.HasField("virtual_machine") and source.state(event.virtual_machine) == "RUNNING":
            break
    watch.cancel()
    step("ok: the watch saw it run")

    try:
        source.call(VMS, "ResumeVirtualMachine", name=NAME)
        raise Failed("resume of a running machine was not refused")
    except grpc.RpcError as error:
        check(error.code() == grpc.StatusCode.FAILED_PRECONDITION, f"resume of a running machine is refused: {error.details()}")

    before = counters(source.call(PMU, "GetPmu", name=NAME))
    until = time.monotonic() + CALL_DEADLINE
    while counters(source.call(PMU, "GetPmu", name=NAME)) == before:
        if time.monotonic() > until:
            raise Failed("the counters do not move")
    step("ok: its counters move")

    operation = source.call(
        MIGRATIONS,
        "CreateMigration",
        parent=NAME,
        request_id=str(uuid.uuid4()),
        spec={"destination": peer, "allow_plaintext": True},
    )
    name = source.unpack(operation.metadata).name
    phases = [message.phase for message in source.call(MIGRATIONS, "WatchMigration", name=name)]
    migration = source.wait(operation, MIGRATION_DEADLINE)
    result = migration.result
    check(len(phases) > 0, f"the migration was watched: {' > '.join(dict.fromkeys(phases))}")
    check(
        [vcpu.digest for vcpu in result.pmu_at_stop] == [vcpu.digest for vcpu in result.pmu_at_resume]
        and len(result.pmu_at_stop) == 1,
        f"PMU state is the same at stop and resume; blackout {result.blackout_us / 1000:.1f} ms, {result.rounds} rounds",
    )

    vm = destination.call(VMS, "GetVirtualMachine", name=NAME)
    check(destination.state(vm) == "RUNNING", "it runs on the destination")
    pmu = destination.call(PMU, "GetPmu", name=NAME)
    check(pmu.probe.vcpus[0].faults == 0, "the guest itself reports no fault")

    destination.wait(destination.call(VMS, "DeleteVirtualMachine", name=NAME), CALL_DEADLINE)
    try:
        destination.call(VMS, "GetVirtualMachine", name=NAME)
        raise Failed("the deleted machine is still there")
    except grpc.RpcError as error:
        check(error.code() == grpc.StatusCode.NOT_FOUND, "it is deleted")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vpmud", required=True, help="path of the vpmud binary")
    parser.add_argument("--hypervisor", choices=["kvm", "simulated"], help="default: what vpmud chooses")
    args = parser.parse_args()
    options = ["--hypervisor", args.hypervisor] if args.hypervisor else []

    directory = tempfile.mkdtemp(prefix="vpmu-py-")
    daemons = []
    try:
        for name in ("a", "b"):
            daemons.append(Daemon(os.path.abspath(args.vpmud), directory, name, options))
        run(Host(daemons[0].api), Host(daemons[1].api), daemons[1].peer)
        print("reflection client: all steps passed")
        return 0
    except (Failed, grpc.RpcError, grpc.FutureTimeoutError) as error:
        print(f"reflection client: FAILED: {error}", file=sys.stderr)
        for daemon in daemons:
            daemon.log.flush()
            with open(daemon.log.name, encoding="utf-8") as log:
                tail = log.readlines()[-30:]
            print(f"--- last lines of {daemon.name}'s log ---\n{''.join(tail)}", file=sys.stderr)
        return 1
    finally:
        for daemon in daemons:
            daemon.stop()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
