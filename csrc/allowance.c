/* allowance.c -- what the system lets this process have: the one place that reads affinity, cgroups, /proc/meminfo.
 *
 * A limit of a cgroup holds for all groups inside it, so the process's own group is read and then those above, up to
 * the mount; the tightest counts.  Both versions are read, as a system may have both, the memory in one and the
 * processors in the other.  A container often sees its own group at the mount, whatever /proc/self/cgroup says: folders
 * that are not there say nothing.  A limit is not room: what the group uses already is taken off, but for the pages of
 * files, which the kernel gives up when somebody needs memory.
 *
 * Everything but the affinity is read below a root folder, "" outside the tests.  What cannot be read is no limit.
 */
#define _GNU_SOURCE
#include "allowance.h"
#include "cpu/pool.h"
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define NO_LIMIT ((uint64_t)1 << 60)     /* version 1 writes a number beyond it where there is no limit */
#define LONGEST 1024                     /* of a path, and of a line that is understood */

/* --- files of a few lines ----------------------------------------------------------------- */
static FILE *open_in(const char *folder, const char *name) {
    char path[LONGEST];
    size_t n = (size_t)snprintf(path, sizeof path, "%s/%s", folder, name);
    return n < sizeof path ? fopen(path, "re") : NULL;
}
/* The whole numbers that the file begins with: how many of two there are ("max" is none). */
static int numbers_in(const char *folder, const char *name, long long *a, long long *b) {
    FILE *f = open_in(folder, name);
    if (!f) return 0;
    int n = fscanf(f, "%lld %lld", a, b);
    fclose(f);
    return n > 0 ? n : 0;
}
/* A size in bytes; -1: the file has none. */
static long long bytes_in(const char *folder, const char *name) {
    long long n, ignored;
    return numbers_in(folder, name, &n, &ignored) && n >= 0 ? n : -1;
}
/* The number behind a word at the beginning of a line; 0: there is no such line. */
static uint64_t number_behind(const char *folder, const char *name, const char *word) {
    char line[LONGEST], key[64];
    unsigned long long n = 0;
    int found = 0;
    FILE *f = open_in(folder, name);
    if (!f) return 0;
    while (!found && fgets(line, sizeof line, f)) found = sscanf(line, "%63s %llu", key, &n) == 2 && !strcmp(key, word);
    fclose(f);
    return found ? n : 0;
}

/* --- a group ------------------------------------------------------------------------------ */
static void say_where(char *out, const char *folder, const char *name) {
    size_t n = (size_t)snprintf(out, MS4_FILE_NAME, "%s/%s", folder, name);
    if (n >= MS4_FILE_NAME) snprintf(out, MS4_FILE_NAME, "%s", name);
}
static uint64_t less(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }
/* What a group uses, without the pages of files.  Version 1 has other names for sums over the groups inside. */
static uint64_t used_memory(const char *folder) {
    long long used = bytes_in(folder, "memory.current");
    const char *stat = "memory.stat";
    if (used >= 0)
        return less((uint64_t)used,
                    number_behind(folder, stat, "active_file") + number_behind(folder, stat, "inactive_file"));
    used = bytes_in(folder, "memory.usage_in_bytes");
    return less(used < 0 ? 0 : (uint64_t)used, number_behind(folder, stat, "total_active_file")
                                                   + number_behind(folder, stat, "total_inactive_file"));
}
static void keep_limit(uint64_t limit, const char *folder, const char *name, ms4_allowance *out) {
    uint64_t used = used_memory(folder);
    if (*out->limit_file && less(limit, used) >= less(out->limit, out->used)) return;
    out->limit = limit;
    out->used = used;
    say_where(out->limit_file, folder, name);
}
static void look_at_memory(const char *folder, ms4_allowance *out) {
    static const char *const names[] = { "memory.max", "memory.high", "memory.limit_in_bytes" };
    for (int i = 0; i < 3; i++) {
        long long limit = bytes_in(folder, names[i]);
        if (limit >= 0 && (uint64_t)limit < NO_LIMIT) keep_limit((uint64_t)limit, folder, names[i], out);
    }
    /* Version 1 tells the limits of the groups above, too, which a container does not see. */
    const uint64_t above = number_behind(folder, "memory.stat", "hierarchical_memory_limit");
    if (above && above < NO_LIMIT) keep_limit(above, folder, "memory.stat", out);
}
static void keep_cpus(double cpus, const char *folder, const char *name, ms4_allowance *out) {
    if (*out->cpus_file && cpus >= out->cpus) return;
    out->cpus = cpus;
    say_where(out->cpus_file, folder, name);
}
static void look_at_quota(const char *folder, ms4_allowance *out) {
    long long quota, period, ignored;
    period = 100000;                     /* the kernel's, where only the quota is written */
    if (numbers_in(folder, "cpu.max", &quota, &period) && quota > 0 && period > 0)
        keep_cpus((double)quota / (double)period, folder, "cpu.max", out);
    if (numbers_in(folder, "cpu.cfs_quota_us", &quota, &ignored)
        && numbers_in(folder, "cpu.cfs_period_us", &period, &ignored) && quota > 0 && period > 0)
        keep_cpus((double)quota / (double)period, folder, "cpu.cfs_quota_us", out);
}
/* A list like 0-3,7 of the processors of a set.  It is told only if it leaves fewer than the affinity does. */
static void look_at_set(const char *folder, ms4_allowance *out) {
    static const char *const names[] = { "cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus" };
    for (int i = 0; i < 3; i++) {
        int first, last, n = 0, after;
        FILE *f = open_in(folder, names[i]);
        if (!f) continue;
        while (fscanf(f, "%d", &first) == 1 && first >= 0) {
            last = first;
            after = fgetc(f);
            if (after == '-' && fscanf(f, "%d", &last) == 1) after = fgetc(f);
            n += last >= first ? last - first + 1 : 0;
            if (after != ',') break;
        }
        fclose(f);
        if (n > 0 && n < out->n_affinity) keep_cpus(n, folder, names[i], out);
    }
}

/* --- the groups of this process ----------------------------------------------------------- */
/* The path of the process's group, without the controllers' mount: that of version 2 if controller is "".  Empty at the
 * mount, and where the path leads out of what this process can see. */
static void own_group(const char *root, const char *controller, char *out) {
    char folder[LONGEST], line[LONGEST];
    *out = 0;
    if ((size_t)snprintf(folder, sizeof folder, "%s/proc/self", root) >= sizeof folder) return;
    FILE *f = open_in(folder, "cgroup");
    if (!f) return;
    while (fgets(line, sizeof line, f)) {
        char *end = strchr(line, '\n'), *list = strchr(line, ':'), *path = list ? strchr(list + 1, ':') : NULL;
        if (!path || (!end && !feof(f))) continue;
        if (end) *end = 0;
        *path++ = 0;
        list++;
        int found = !*controller && !*list;
        for (char *next, *name = list; *controller && name; name = next) {
            if ((next = strchr(name, ','))) *next++ = 0;
            found |= !strcmp(name, controller);
        }
        if (!found) continue;
        snprintf(out, LONGEST, "%s", strstr(path, "/..") ? "" : path);
        break;
    }
    fclose(f);
}
/* Reads the group and those above it, up to the mount. */
static void look_upwards(const char *root, const char *mount, const char *group, ms4_allowance *out) {
    char folder[LONGEST];
    size_t top = strlen(root) + strlen("/sys/fs/cgroup") + strlen(mount);
    size_t n = (size_t)snprintf(folder, sizeof folder, "%s/sys/fs/cgroup%s%s", root, mount, group);
    if (n >= sizeof folder) return;
    for (;;) {
        while (n > top && folder[n - 1] == '/') folder[--n] = 0;
        look_at_memory(folder, out);
        look_at_quota(folder, out);
        look_at_set(folder, out);
        if (n <= top) return;
        while (n > top && folder[n - 1] != '/') folder[--n] = 0;
    }
}
void ms4_allowed(const char *root, ms4_allowance *out) {
    static const struct { const char *controller, *mount; } hierarchies[] = {
        { "", "" }, { "", "/unified" }, { "memory", "/memory" },
        { "cpu", "/cpu" }, { "cpu", "/cpu,cpuacct" }, { "cpu", "/cpuacct,cpu" }, { "cpuset", "/cpuset" },
    };
    char folder[LONGEST], group[LONGEST];
    cpu_set_t set;
    *out = (ms4_allowance){ 0 };
    out->n_affinity = sched_getaffinity(0, sizeof set, &set) ? (int32_t)sysconf(_SC_NPROCESSORS_ONLN) : CPU_COUNT(&set);
    for (size_t i = 0; i < sizeof hierarchies / sizeof *hierarchies; i++) {
        own_group(root, hierarchies[i].controller, group);
        look_upwards(root, hierarchies[i].mount, group, out);
    }
    if ((size_t)snprintf(folder, sizeof folder, "%s/proc", root) < sizeof folder) {
        out->total = number_behind(folder, "meminfo", "MemTotal:") << 10;
        out->available = number_behind(folder, "meminfo", "MemAvailable:") << 10;
    }
    out->room = out->available;
    const uint64_t left = less(out->limit, out->used);
    if (*out->limit_file && (!out->available || left < out->room)) out->room = left;
    out->n_threads = out->n_affinity;
    if (*out->cpus_file && out->cpus < out->n_threads) out->n_threads = (int32_t)out->cpus;
    if (out->n_threads < 1) out->n_threads = 1;
    if (out->n_threads > POOL_MAX_THREADS) out->n_threads = POOL_MAX_THREADS;
}
int32_t allowance_threads(void) {
    ms4_allowance a;
    ms4_allowed("", &a);
    return a.n_threads;
}
uint64_t allowance_room(void) {
    ms4_allowance a;
    ms4_allowed("", &a);
    return a.room;
}
uint64_t allowance_available(void) {
    ms4_allowance a;
    ms4_allowed("", &a);
    return a.available;
}
