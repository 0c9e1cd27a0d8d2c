/* What generated code may call and a bare-metal tool chain lacks. Weak: a C library's own functions win. */
#include <stddef.h>
#include <stdint.h>

#define WEAK __attribute__((weak))

float nearbyintf(float), rintf(float), roundevenf(float), floorf(float), ceilf(float), truncf(float);
void *memcpy(void *restrict, const void *restrict, size_t);
void *memmove(void *, const void *, size_t);
void *memset(void *, int, size_t);

/* Above 2^23 every float is an integer. Below, adding and subtracting 2^23 rounds half to even. */
static const float integer_from = 8388608.0f;

WEAK float nearbyintf(float x)
{
    if (!(__builtin_fabsf(x) < integer_from)) return x;
    volatile float magic = __builtin_copysignf(integer_from, x); /* volatile: not folded away */
    float moved = x + magic;
    return __builtin_copysignf(moved - magic, x);
}

WEAK float rintf(float x) { return nearbyintf(x); }
WEAK float roundevenf(float x) { return nearbyintf(x); }

WEAK float floorf(float x)
{
    float nearest = nearbyintf(x);
    return nearest > x ? nearest - 1.0f : nearest;
}

WEAK float ceilf(float x) { return -floorf(-x); }

WEAK float truncf(float x) { return x < 0 ? ceilf(x) : floorf(x); }

#ifndef __linux__ /* there the C library's are always linked */
/* Kernels copy runs of pixels. These processors load and store words at any address. */
typedef uint32_t __attribute__((aligned(1), may_alias)) any_word;

WEAK void *memcpy(void *restrict target, const void *restrict source, size_t bytes)
{
    unsigned char *to = target;
    const unsigned char *from = source;
    for (; bytes >= 16; bytes -= 16, to += 16, from += 16) {
        /* Word by word: a copy of all sixteen bytes at once would be compiled to a call of this function. */
        any_word *words = (any_word *)to;
        const any_word *others = (const any_word *)from;
        any_word a = others[0], b = others[1], c = others[2], d = others[3];
        words[0] = a, words[1] = b, words[2] = c, words[3] = d;
    }
    for (; bytes > 0; --bytes) *to++ = *from++;
    return target;
}

WEAK void *memmove(void *target, const void *source, size_t bytes)
{
    unsigned char *to = target;
    const unsigned char *from = source;
    if (to < from) {
        for (; bytes > 0; --bytes) *to++ = *from++;
    } else {
        for (; bytes > 0; --bytes) to[bytes - 1] = from[bytes - 1];
    }
    return target;
}

WEAK void *memset(void *target, int value, size_t bytes)
{
    for (unsigned char *to = target; bytes > 0; --bytes) *to++ = (unsigned char)value;
    return target;
}

void __aeabi_memcpy(void *t, const void *s, size_t n) __attribute__((weak));
void __aeabi_memcpy(void *t, const void *s, size_t n) { memcpy(t, s, n); }
void __aeabi_memcpy4(void *t, const void *s, size_t n) __attribute__((weak, alias("__aeabi_memcpy")));
void __aeabi_memcpy8(void *t, const void *s, size_t n) __attribute__((weak, alias("__aeabi_memcpy")));
void __aeabi_memset(void *t, size_t n, int v) __attribute__((weak));
void __aeabi_memset(void *t, size_t n, int v) { memset(t, v, n); }
void __aeabi_memset4(void *t, size_t n, int v) __attribute__((weak, alias("__aeabi_memset")));
void __aeabi_memset8(void *t, size_t n, int v) __attribute__((weak, alias("__aeabi_memset")));
void __aeabi_memclr(void *t, size_t n) __attribute__((weak));
void __aeabi_memclr(void *t, size_t n) { memset(t, 0, n); }
void __aeabi_memclr4(void *t, size_t n) __attribute__((weak, alias("__aeabi_memclr")));
void __aeabi_memclr8(void *t, size_t n) __attribute__((weak, alias("__aeabi_memclr")));

#endif

/* LLVM widens conversions of two floats to 64-bit integers, under a name that the ARM run-time ABI does not have. */
int64_t __fixsfdi(float x) __attribute__((weak));
int64_t __fixsfdi(float x)
{
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    int exponent = (int)(bits >> 23 & 255) - 150; /* of the last bit of the significand */
    uint64_t magnitude = (bits & 0x7FFFFF) | 0x800000;
    if (exponent < -23) return 0;
    if (exponent >= 40) return bits >> 31 ? INT64_MIN : INT64_MAX;
    magnitude = exponent < 0 ? magnitude >> -exponent : magnitude << exponent;
    return bits >> 31 ? -(int64_t)magnitude : (int64_t)magnitude;
}
