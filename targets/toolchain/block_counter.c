/* A plug-in of qemu's user-mode emulator that counts executed instructions.
 *
 *   qemu-aarch64 -plugin libblock_counter.so,out=FILE[,blocks=on] PROGRAM ...
 *
 * FILE gets the line "total N". A program marks points between its phases by asking for the process group of the process
 * 0x62770000 + K, which nobody has: FILE gets "mark K N", N instructions having been executed so far.
 * With blocks=on there is one line for each executed translation block:
 * "block ADDRESS EXECUTIONS CODE": the host's address of the code and its bytes in hexadecimal. After these come the
 * process's mappings of files: "map FIRST LAST OFFSET FILE".
 *
 * Distributions ship no header for plug-ins, so the declarations of API version 1 (qemu 6 to 8) stand here. The counters
 * are not atomic: counts are exact for programs that compute in one thread.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef struct {
  const char *target_name;
  struct {
    int min, cur;
  } version;
  bool system_emulation;
  union {
    struct {
      int smp_vcpus, max_vcpus;
    } system;
  };
} qemu_info_t;
enum { kInlineAdd = 0 };

typedef void (*translate_callback)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*exit_callback)(qemu_plugin_id_t, void *);
typedef void (*syscall_callback)(qemu_plugin_id_t, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                                 uint64_t, uint64_t, uint64_t);
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, translate_callback);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
extern void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, exit_callback, void *);
extern void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, syscall_callback);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
extern size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);
extern void *qemu_plugin_insn_haddr(const struct qemu_plugin_insn *);

EXPORT int qemu_plugin_version = 1;

struct block {
  struct block *next;
  uint64_t address, instructions, executions;
  const void *host;
  size_t bytes;
  unsigned char code[];
};

enum { kBuckets = 1 << 16, kMaxMarks = 256 };
enum { kGetProcessGroup = 155, kGetProcessGroup32 = 132, kMark = 0x6277 }; /* system calls of 64- and 32-bit ARM */
static int64_t mark_call;
static struct block *buckets[kBuckets];
static uint64_t total;
static const char *out_path;
static bool with_blocks;
static struct {
  unsigned number;
  uint64_t total;
} marks[kMaxMarks];
static int mark_count;

static struct block *new_block(const struct qemu_plugin_tb *tb, size_t count) {
  size_t bytes = 0;
  for (size_t i = 0; i < count; ++i) bytes += qemu_plugin_insn_size(qemu_plugin_tb_get_insn(tb, i));
  struct block *block = calloc(1, sizeof(*block) + bytes);
  if (block == NULL) abort();
  for (size_t i = 0; i < count; ++i) {
    const struct qemu_plugin_insn *one = qemu_plugin_tb_get_insn(tb, i);
    memcpy(block->code + block->bytes, qemu_plugin_insn_data(one), qemu_plugin_insn_size(one));
    block->bytes += qemu_plugin_insn_size(one);
  }
  block->instructions = count;
  block->address = qemu_plugin_tb_vaddr(tb);
  block->host = qemu_plugin_insn_haddr(qemu_plugin_tb_get_insn(tb, 0));
  return block;
}

/* The same code may be translated more than once; its executions are summed in one record. */
static struct block *find_block(const struct qemu_plugin_tb *tb, size_t count) {
  uint64_t address = qemu_plugin_tb_vaddr(tb);
  struct block **head = &buckets[(address >> 2) % kBuckets];
  for (struct block *block = *head; block != NULL; block = block->next) {
    if (block->address == address && block->instructions == count) return block;
  }
  struct block *block = new_block(tb, count);
  block->next = *head;
  *head = block;
  return block;
}

static void on_translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
  (void)id;
  size_t count = qemu_plugin_tb_n_insns(tb);
  qemu_plugin_register_vcpu_tb_exec_inline(tb, kInlineAdd, &total, count);
  if (with_blocks) qemu_plugin_register_vcpu_tb_exec_inline(tb, kInlineAdd, &find_block(tb, count)->executions, 1);
}

static void on_system_call(qemu_plugin_id_t id, unsigned cpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3,
                           uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
  (void)id, (void)cpu, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
  if (number != mark_call || (a1 & 0xffffffff) >> 16 != kMark || mark_count == kMaxMarks) return;
  marks[mark_count].number = (unsigned)(a1 & 0xffff);
  marks[mark_count++].total = total;
}

static void write_blocks(FILE *file) {
  for (int i = 0; i < kBuckets; ++i) {
    for (const struct block *block = buckets[i]; block != NULL; block = block->next) {
      if (block->executions == 0) continue;
      fprintf(file, "block %llx %llu ", (unsigned long long)(uintptr_t)block->host,
              (unsigned long long)block->executions);
      for (size_t k = 0; k < block->bytes; ++k) fprintf(file, "%02x", block->code[k]);
      fputc('\n', file);
    }
  }
}

/* The emulated program's files are mapped into this process, so the host's list says which file a block is from. */
static void write_mappings(FILE *file) {
  FILE *maps = fopen("/proc/self/maps", "r");
  if (maps == NULL) return;
  char line[4608], path[4096];
  unsigned long long first, last, offset;
  while (fgets(line, sizeof(line), maps) != NULL) {
    path[0] = 0;
    if (sscanf(line, "%llx-%llx %*s %llx %*s %*s %4095[^\n]", &first, &last, &offset, path) == 4 && path[0] == '/') {
      fprintf(file, "map %llx %llx %llx %s\n", first, last, offset, path);
    }
  }
  fclose(maps);
}

static void on_exit_write(qemu_plugin_id_t id, void *unused) {
  (void)id;
  (void)unused;
  FILE *file = fopen(out_path, "w");
  if (file == NULL) return;
  fprintf(file, "total %llu\n", (unsigned long long)total);
  for (int i = 0; i < mark_count; ++i) {
    fprintf(file, "mark %u %llu\n", marks[i].number, (unsigned long long)marks[i].total);
  }
  if (with_blocks) {
    write_blocks(file);
    write_mappings(file);
  }
  fclose(file);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv) {
  mark_call = strcmp(info->target_name, "arm") == 0 ? kGetProcessGroup32 : kGetProcessGroup;
  for (int i = 0; i < argc; ++i) {
    if (strncmp(argv[i], "out=", 4) == 0) out_path = strdup(argv[i] + 4);
    if (strcmp(argv[i], "blocks=on") == 0) with_blocks = true;
  }
  if (out_path == NULL) return 1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
  qemu_plugin_register_vcpu_syscall_cb(id, on_system_call);
  qemu_plugin_register_atexit_cb(id, on_exit_write, NULL);
  return 0;
}
