// What this CPU and its operating system can run, by CPUID and XGETBV on x86-64, by the kernel's capability bits on arm64.
#define _GNU_SOURCE
#include "cpu.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef struct {
    uint32_t eax, ebx, ecx, edx;
} Leaf;

static Leaf leaf(uint32_t number, uint32_t part) {
    Leaf found = {0, 0, 0, 0};
    __get_cpuid_count(number, part, &found.eax, &found.ebx, &found.ecx, &found.edx);
    return found;
}

static int bit(uint32_t word, int number) { return word >> number & 1; }

// Whether the system saves all of these parts of a thread's state: 2 and 4 are SSE and AVX, 0xE0 AVX-512, 0x60000 AMX.
static int system_saves(uint32_t parts) {
    if (!bit(leaf(1, 0).ecx, 27)) return 0;  // OSXSAVE: XGETBV may be called
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & parts) == parts;
}

static int runs_avx2(void) {
    uint32_t first = leaf(1, 0).ecx;
    int fma = bit(first, 12), avx = bit(first, 28), f16c = bit(first, 29);
    return fma && avx && f16c && bit(leaf(7, 0).ebx, 5) && system_saves(0x6);
}

static int runs_avx2vnni(void) { return runs_avx2() && bit(leaf(7, 1).eax, 4); }

static int runs_avx512(void) {
    Leaf seventh = leaf(7, 0);
    int f = bit(seventh.ebx, 16), dq = bit(seventh.ebx, 17), bw = bit(seventh.ebx, 30), vl = bit(seventh.ebx, 31);
    return runs_avx2() && f && dq && bw && vl && bit(seventh.ecx, 11) && system_saves(0xE6);
}

static int has_avx512bf16(void) { return runs_avx512() && bit(leaf(7, 1).eax, 5); }

// Only AMD's are worth it: on a Sapphire Rapids, products of pairs take longer than two fused products of float32.
static int runs_avx512bf16(void) { return has_avx512bf16() && leaf(0, 0).ecx == 0x444d4163; }  // Authenti-cAMD

// Linux gives a process the tiles' state when it asks for it.
static int tiles_granted(void) {
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

static int runs_amx(void) {
    uint32_t edx = leaf(7, 0).edx;
    int bf16 = bit(edx, 22), tile = bit(edx, 24), int8 = bit(edx, 25);
    return has_avx512bf16() && bf16 && tile && int8 && system_saves(0x600E6) && tiles_granted();
}

int mdi_cpu_runs(const char *isa) {
    if (!strcmp(isa, "scalar")) return 1;
    if (!strcmp(isa, "avx2")) return runs_avx2();
    if (!strcmp(isa, "avx2vnni")) return runs_avx2vnni();
    if (!strcmp(isa, "avx512")) return runs_avx512();
    if (!strcmp(isa, "avx512bf16")) return runs_avx512bf16();
    if (!strcmp(isa, "amx")) return runs_amx();
    return 0;
}

#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

// Linux: bits of HWCAP (word 0) and HWCAP2 (word 1), arch/arm64/include/uapi/asm/hwcap.h.
#if defined(__linux__)
static int has(int word, int bit) { return getauxval(word ? AT_HWCAP2 : AT_HWCAP) >> bit & 1; }
static int has_dotprod(void) { return has(0, 20); }
static int has_i8mm(void) { return has(1, 13); }
static int has_bf16(void) { return has(1, 14); }
#elif defined(__APPLE__)
static int has(const char *name) {
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname(name, &found, &size, NULL, 0) == 0 && found;
}
static int has_dotprod(void) { return has("hw.optional.arm.FEAT_DotProd"); }
static int has_i8mm(void) { return has("hw.optional.arm.FEAT_I8MM"); }
static int has_bf16(void) { return has("hw.optional.arm.FEAT_BF16"); }
#else
static int has_dotprod(void) { return 0; }
static int has_i8mm(void) { return 0; }
static int has_bf16(void) { return 0; }
#endif

int mdi_cpu_runs(const char *isa) {
    if (!strcmp(isa, "scalar")) return 1;
    if (!strcmp(isa, "neon")) return has_dotprod();
    if (!strcmp(isa, "neonbf16")) return has_dotprod() && has_i8mm() && has_bf16();
    return 0;
}

#else
int mdi_cpu_runs(const char *isa) { return !strcmp(isa, "scalar"); }
#endif
