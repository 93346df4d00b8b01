#!/usr/bin/env python3
"""Checks the object that `vpmud demo --output json` prints: its keys, and what it says of every counter.

    vpmud demo --output json > demo.json && python3 tests/python/check_demo.py demo.json
"""

import json
import sys

KEYS = ["hypervisor", "pmu_mode", "vcpus", "memory_mib", "migration", "counters", "pmis", "guest_faults", "checks"]
MIGRATION_KEYS = ["total_ms", "blackout_ms", "guest_gap_ms", "bytes", "rounds"]


def problems(demo):
    """Everything that is wrong with it."""
    found = [f"no {key}" for key in KEYS if key not in demo]
    found += [f"no migration.{key}" for key in MIGRATION_KEYS if key not in demo.get("migration", {})]
    if found:
        return found
    if demo["hypervisor"] not in ("kvm", "simulated"):
        found.append(f"hypervisor is {demo['hypervisor']!r}")
    if demo["guest_faults"] != 0:
        found.append(f"guest_faults is {demo['guest_faults']}")
    if not demo["counters"]:
        found.append("no counters")
    for counter in demo["counters"]:
        name = f"vCPU {counter['vcpu']} {counter['counter']}"
        if counter["at_stop"] != counter["at_resume"]:
            found.append(f"{name}: {counter['at_stop']} at the stop, {counter['at_resume']} at the resume")
        if not counter.get("pmi") and not counter["before"] <= counter["at_stop"] <= counter["after"]:
            found.append(f"{name} went backwards: {counter}")
    if not any(counter.get("pmi") for counter in demo["counters"]):
        found.append("no counter takes overflows")
    if demo["pmis"] < 1:
        found.append("no PMI was taken")
    found += [f"check {check['name']}: {check['detail']}" for check in demo["checks"] if not check["ok"]]
    if not demo["checks"]:
        found.append("no checks")
    return found


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        demo = json.load(file)
    found = problems(demo)
    for problem in found:
        print(f"demo: {problem}", file=sys.stderr)
    if not found:
        print(f"demo: {len(demo['counters'])} counters and {len(demo['checks'])} checks hold")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
