/* Runs the network once on a board (or its emulator) that a debugger serves files to.
 *
 * Reads input_0, input_1, ... from the host by semihosting, runs the network, writes output_0, ... and "usage": stack
 * and arena bytes that were touched, ticks of the system timer. Built with NET_TRACE it writes "trace", too.
 */
#include <stdint.h>

#include "net.h"

enum { SYS_OPEN = 1, SYS_CLOSE = 2, SYS_WRITE0 = 4, SYS_WRITE = 5, SYS_READ = 6, SYS_EXIT = 0x18 };
enum { READ_BINARY = 1, WRITE_BINARY = 5 };
enum { EXIT_SUCCESS_REASON = 0x20026, EXIT_FAILURE_REASON = 0x20024 };
enum { STACK_PAINT = 0xA5C3A5C3, ARENA_PAINT = 0xA5 };
enum { TICKS = 0xFFFFFF };

#define REGISTER(address) (*(volatile uint32_t *)(address))
#define SYSTICK_CONTROL REGISTER(0xE000E010)
#define SYSTICK_RELOAD REGISTER(0xE000E014)
#define SYSTICK_VALUE REGISTER(0xE000E018)
#define COPROCESSOR_ACCESS REGISTER(0xE000ED88)

extern uint32_t __stack_bottom[], __stack_top[], __bss_start[], __bss_end[];
extern uint8_t net_arena[];

static uint8_t io[NET_IO_BYTES] __attribute__((aligned(NET_ALIGNMENT)));
static uintptr_t trace_file;

static uintptr_t host(uintptr_t operation, const void *arguments)
{
    register uintptr_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = arguments;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

__attribute__((noreturn)) static void stop(uintptr_t reason)
{
    host(SYS_EXIT, (const void *)reason);
    for (;;) {}
}

__attribute__((noreturn)) static void fail(const char *message)
{
    host(SYS_WRITE0, message);
    stop(EXIT_FAILURE_REASON);
}

static uintptr_t open_file(const char *name, uintptr_t mode)
{
    uintptr_t length = 0;
    while (name[length]) ++length;
    const uintptr_t arguments[] = {(uintptr_t)name, mode, length};
    uintptr_t file = host(SYS_OPEN, arguments);
    if (file == (uintptr_t)-1) fail("cannot open a file on the host\n");
    return file;
}

static void close_file(uintptr_t file) { host(SYS_CLOSE, &file); }

static void write_bytes(uintptr_t file, const void *data, uint32_t bytes)
{
    const uintptr_t arguments[] = {file, (uintptr_t)data, bytes};
    if (host(SYS_WRITE, arguments) != 0) fail("cannot write to the host\n");
}

/* "input_" and a number of up to two digits. */
static const char *numbered(char *name, const char *stem, int number)
{
    char *end = name;
    while (*stem) *end++ = *stem++;
    if (number >= 10) *end++ = (char)('0' + number / 10);
    *end++ = (char)('0' + number % 10);
    *end = 0;
    return name;
}

static void read_input(int number, uint8_t *data, uint32_t bytes)
{
    char name[16];
    uintptr_t file = open_file(numbered(name, "input_", number), READ_BINARY);
    const uintptr_t arguments[] = {file, (uintptr_t)data, bytes};
    if (host(SYS_READ, arguments) != 0) fail("an input is too short\n");
    close_file(file);
}

static void write_output(int number, const uint8_t *data, uint32_t bytes)
{
    char name[16];
    uintptr_t file = open_file(numbered(name, "output_", number), WRITE_BINARY);
    write_bytes(file, data, bytes);
    close_file(file);
}

#ifdef NET_TRACE
void net_trace(const void *data, uint32_t bytes) { write_bytes(trace_file, data, bytes); }
#endif

/* Not inlined: its frame is the upper end of the stack that is counted. */
__attribute__((noinline)) static void measured_run(const void **inputs, void **outputs, uint32_t *usage)
{
    uint32_t here;
    volatile uint32_t *paint = __stack_bottom;
    uint32_t *frame = &here - 16; /* the rest of this frame */
    while (paint < frame) *paint++ = STACK_PAINT;
    for (uint32_t i = 0; i < NET_ARENA_BYTES; ++i) ((volatile uint8_t *)net_arena)[i] = ARENA_PAINT;

    SYSTICK_RELOAD = TICKS;
    SYSTICK_VALUE = 0;
    SYSTICK_CONTROL = 5; /* on, processor clock, no interrupt */
    uint32_t before = SYSTICK_VALUE;
    int status = net_run(inputs, outputs);
    uint32_t after = SYSTICK_VALUE;
    SYSTICK_CONTROL = 0;
    if (status != 0) fail("net_run refuses its arguments\n");

    paint = __stack_bottom;
    while (paint < frame && *paint == STACK_PAINT) ++paint;
    if (paint == __stack_bottom) fail("the stack is full\n");
    uint32_t arena = NET_ARENA_BYTES;
    while (arena > 0 && net_arena[arena - 1] == ARENA_PAINT) --arena;
    usage[0] = (uint32_t)((uintptr_t)&here - (uintptr_t)paint);
    usage[1] = arena;
    usage[2] = (before - after) & TICKS;
}

static void run(void)
{
    static const uint32_t input_bytes[] = NET_INPUT_BYTES, output_bytes[] = NET_OUTPUT_BYTES;
    const void *inputs[NET_INPUTS + 1];
    void *outputs[NET_OUTPUTS + 1];
    uint8_t *next = io;
    for (int i = 0; i < NET_INPUTS; ++i) {
        inputs[i] = next;
        read_input(i, next, input_bytes[i]);
        next += (input_bytes[i] + NET_ALIGNMENT - 1) & ~(uint32_t)(NET_ALIGNMENT - 1);
    }
    for (int i = 0; i < NET_OUTPUTS; ++i) {
        outputs[i] = next;
        next += (output_bytes[i] + NET_ALIGNMENT - 1) & ~(uint32_t)(NET_ALIGNMENT - 1);
    }
#ifdef NET_TRACE
    trace_file = open_file("trace", WRITE_BINARY);
#endif
    uint32_t usage[3];
    measured_run(inputs, outputs, usage);
    for (int i = 0; i < NET_OUTPUTS; ++i) write_output(i, outputs[i], output_bytes[i]);
    uintptr_t file = open_file("usage", WRITE_BINARY);
    write_bytes(file, usage, sizeof usage);
    close_file(file);
#ifdef NET_TRACE
    close_file(trace_file);
#endif
}

__attribute__((noreturn)) void reset(void)
{
    COPROCESSOR_ACCESS |= 0xF << 20; /* floating point and vectors */
    __asm__ volatile("dsb\nisb");
    for (volatile uint32_t *word = __bss_start; word < __bss_end; ++word) *word = 0;
    run();
    stop(EXIT_SUCCESS_REASON);
}

__attribute__((noreturn)) static void fault(void) { fail("the processor took a fault\n"); }

__attribute__((section(".vectors"), used)) const void *const vectors[16] = {
    __stack_top, (const void *)reset, (const void *)fault, (const void *)fault,
    (const void *)fault, (const void *)fault, (const void *)fault,
};
