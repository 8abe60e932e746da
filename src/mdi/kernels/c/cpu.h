// What this CPU and its operating system can run.
#ifndef MDI_CPU_H
#define MDI_CPU_H

// 1 if code compiled for the instruction set (scalar, avx2, avx2vnni, avx512, avx512bf16, amx, neon, neonbf16) runs here.
int mdi_cpu_runs(const char *isa);

#endif
