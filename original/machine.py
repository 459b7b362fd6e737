"""Describe the machine, for the records of the programs beside this, under any TensorFlow."""

import os
import platform
import re
import sys

import psutil


def machine():
    """Return the processor, its cores and the system, in the words of today's bench scripts."""
    processor = platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            model_name = re.search(r"model name\s*: (.*)", file.read())
        if model_name:
            processor = model_name[1]
    physical = psutil.cpu_count(logical=False)
    if physical is None:
        return f"{processor}, {os.cpu_count()} CPUs, {sys.platform}"
    return f"{processor}, {physical} physical cores, {sys.platform}"
