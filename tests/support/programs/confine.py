"""Run another Python program where memory cannot be made executable, or print that this is not possible.

PR_SET_MDWE of prctl(2), since Linux 6.3, is equivalent to MemoryDenyWriteExecute= of systemd.exec(5).
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
