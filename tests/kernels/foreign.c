// Runs the self-test of a library's instruction sets: foreign LIBRARY ISA... For machines that are emulated.
#include <dlfcn.h>
#include <stdio.h>

static int passes(void *library, const char *isa) {
    int (*runs)(const char *) = dlsym(library, "mdi_cpu_runs");
    char name[64];
    snprintf(name, sizeof name, "mdi_%s_self_test", isa);
    const char *(*self_test)(void) = dlsym(library, name);
    if (!self_test || !runs(isa)) return printf("%s: does not run\n", isa), 0;
    const char *failed = self_test();
    printf("%s: %s\n", isa, failed ? failed : "passes");
    return !failed;
}

int main(int count, char **arguments) {
    void *library = dlopen(arguments[1], RTLD_NOW);
    if (!library) return printf("%s\n", dlerror()), 1;
    ((void (*)(int))dlsym(library, "mdi_set_threads"))(3);
    int passed = 1;
    for (int i = 2; i < count; i++) passed &= passes(library, arguments[i]);
    return !passed;
}
