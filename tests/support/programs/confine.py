"""Runs another program of Python where memory cannot be made executable, or says that this is not possible.

prctl(2): PR_SET_MDWE, of Linux 6.3, forbids what MemoryDenyWriteExecute= of systemd.exec(5) does.
"""

import ctypes
import mmap
import os
import sys

if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):
    print("cannot be confined")
    sys.exit()
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
except PermissionError:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
sys.exit("not confined")
