/* Runs the network once under Linux, in the folder it is started in.
 *
 * Reads input_0, input_1, ..., runs the network, writes output_0, ... and "usage": stack and arena bytes that were
 * touched. Built with NET_TRACE it writes "trace", too.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "net.h"

enum { STACK_PAINT = 0xA5C3A5C3, ARENA_PAINT = 0xA5, STACK_BYTES = 32768 };
enum { MARK = 0x62770000 }; /* an instruction counter notes this number where it stands */

extern uint8_t net_arena[];

static uint8_t io[NET_IO_BYTES] __attribute__((aligned(NET_ALIGNMENT)));
#ifdef NET_TRACE
static FILE *trace_file;
#endif

static void fail(const char *message)
{
    fprintf(stderr, "%s\n", message);
    exit(1);
}

static FILE *open_file(const char *name, const char *mode)
{
    FILE *file = fopen(name, mode);
    if (file == NULL) fail("cannot open a file");
    return file;
}

static void write_bytes(FILE *file, const void *data, uint32_t bytes)
{
    if (fwrite(data, 1, bytes, file) != bytes) fail("cannot write");
}

static FILE *open_port(const char *stem, int number, const char *mode)
{
    char name[32];
    snprintf(name, sizeof name, "%s_%d", stem, number);
    return open_file(name, mode);
}

#ifdef NET_TRACE
void net_trace(const void *data, uint32_t bytes) { write_bytes(trace_file, data, bytes); }
#endif

/* Not inlined: its frame is the upper end of the stack that is counted. */
__attribute__((noinline)) static void measured_run(const void **inputs, void **outputs, uint32_t *usage)
{
    uint32_t here;
    volatile uint32_t *top = &here - 16, *bottom = top - STACK_BYTES / sizeof here;
    for (volatile uint32_t *paint = top - 1; paint >= bottom; --paint) *paint = STACK_PAINT;
    for (uint32_t i = 0; i < NET_ARENA_BYTES; ++i) ((volatile uint8_t *)net_arena)[i] = ARENA_PAINT;

    getpgid(MARK);
    int status = net_run(inputs, outputs);
    getpgid(MARK + 1);
    if (status != 0) fail("net_run refuses its arguments");

    volatile uint32_t *paint = bottom;
    while (paint < top && *paint == STACK_PAINT) ++paint;
    if (paint == bottom) fail("the stack is full");
    uint32_t arena = NET_ARENA_BYTES;
    while (arena > 0 && net_arena[arena - 1] == ARENA_PAINT) --arena;
    usage[0] = (uint32_t)((uintptr_t)&here - (uintptr_t)paint);
    usage[1] = arena;
}

int main(void)
{
    static const uint32_t input_bytes[] = NET_INPUT_BYTES, output_bytes[] = NET_OUTPUT_BYTES;
    const void *inputs[NET_INPUTS + 1];
    void *outputs[NET_OUTPUTS + 1];
    uint8_t *next = io;
    for (int i = 0; i < NET_INPUTS; ++i) {
        FILE *file = open_port("input", i, "rb");
        if (fread(next, 1, input_bytes[i], file) != input_bytes[i]) fail("an input is too short");
        fclose(file);
        inputs[i] = next;
        next += (input_bytes[i] + NET_ALIGNMENT - 1) & ~(uint32_t)(NET_ALIGNMENT - 1);
    }
    for (int i = 0; i < NET_OUTPUTS; ++i) {
        outputs[i] = next;
        next += (output_bytes[i] + NET_ALIGNMENT - 1) & ~(uint32_t)(NET_ALIGNMENT - 1);
    }
#ifdef NET_TRACE
    trace_file = open_file("trace", "wb");
#endif
    uint32_t usage[3] = {0, 0, 0};
    measured_run(inputs, outputs, usage);
    for (int i = 0; i < NET_OUTPUTS; ++i) {
        FILE *file = open_port("output", i, "wb");
        write_bytes(file, outputs[i], output_bytes[i]);
        if (fclose(file) != 0) fail("cannot write");
    }
    FILE *file = open_file("usage", "wb");
    write_bytes(file, usage, sizeof usage);
    fclose(file);
#ifdef NET_TRACE
    fclose(trace_file);
#endif
    return 0;
}
