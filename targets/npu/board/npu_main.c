/* Runs the network once, in the folder it is started in.
 *
 * Reads input_0, input_1, ...; writes output_0, ..., "trace" (activations and output of every integer kernel, in order)
 * and "cycles" (64-bit numbers: the accelerator's cycles at the end of each of its kernels).
 */
#include <stdio.h>
#include <stdlib.h>

#include "net.h"
#include "npu.h"

static uint8_t io[NET_IO_BYTES + 1] __attribute__((aligned(NET_ALIGNMENT)));
static FILE *trace_file, *cycles_file;

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

static FILE *open_port(const char *stem, int number, const char *mode)
{
    char name[32];
    snprintf(name, sizeof name, "%s_%d", stem, number);
    return open_file(name, mode);
}

static void write_bytes(FILE *file, const void *data, size_t bytes)
{
    if (fwrite(data, 1, bytes, file) != bytes) fail("cannot write");
}

void net_trace(const void *data, uint32_t bytes) { write_bytes(trace_file, data, bytes); }

static void note_cycles(int64_t cycles) { write_bytes(cycles_file, &cycles, sizeof cycles); }

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
    trace_file = open_file("trace", "wb");
    cycles_file = open_file("cycles", "wb");
    npu_finished = note_cycles;
    if (net_run(inputs, outputs) != 0) fail("net_run refuses its arguments");
    for (int i = 0; i < NET_OUTPUTS; ++i) {
        FILE *file = open_port("output", i, "wb");
        write_bytes(file, outputs[i], output_bytes[i]);
        if (fclose(file) != 0) fail("cannot write");
    }
    if (fclose(trace_file) != 0 || fclose(cycles_file) != 0) fail("cannot write");
    return 0;
}
