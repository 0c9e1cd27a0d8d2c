/* Preloaded into a process, refuses the tile registers to it: its libraries run as on a processor without AMX.
 *
 * A process must ask Linux for these registers, by syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>

enum { ARCH_PRCTL = 158, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };

long syscall(long number, ...) {
    static long (*next)(long, ...);
    long a[6];
    va_list list;
    va_start(list, number);
    for (int k = 0; k < 6; k++) a[k] = va_arg(list, long);
    va_end(list);
    if (number == ARCH_PRCTL && a[0] == REQUEST_PERMISSION && a[1] == TILE_DATA) {
        errno = EPERM;
        return -1;
    }
    if (!next) next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
