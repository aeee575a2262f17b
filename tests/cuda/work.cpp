/* work.cpp -- streams and events of the emulated device: one thread does what was queued, in some legal order.
 *
 * What is at the head of a stream may be done; of several streams a random one comes first.  To show what was not
 * waited for, a stream is sometimes held back: nothing of it is done until the host waits or HOLD has gone by.
 */
#include "driver.h"
#include <thread>

using std::chrono::steady_clock;
static const auto HOLD = std::chrono::microseconds(800), POLL = std::chrono::microseconds(100);

static void work_loop();
/* The process ends: nothing begins any more, and what runs comes to its end before what it uses is gone. */
static void end_work() {
    driver_state &d = state();
    std::unique_lock<std::mutex> lock(d.lock);
    d.hung = true;
    d.changed.wait(lock, [&] {
        for (stream *s : d.streams) if (s->running) return false;
        return true;
    });
}
void work_add(stream *s, op &&what) {
    driver_state &d = state();
    if (d.lost) return;
    static bool started = false;
    if (!started) {
        started = true;
        atexit(end_work);
        std::thread(work_loop).detach();
    }
    if (d.set.seed && d.random() % 8 == 0) s->held_until = steady_clock::now() + HOLD * (1 + d.random() % 4) / 4;
    s->runs_kernels |= what.kind == op::KERNEL || what.kind == op::GRAPH;
    if (d.set.late && what.kind == op::COPY && !s->runs_kernels && d.n_kernels)
        what.not_before = steady_clock::now() + std::chrono::milliseconds(d.set.late);
    s->queue.emplace_back(s->last = ++d.numbers, std::move(what));
    d.changed.notify_all();
}
bool work_done(stream *s, uint64_t number) {
    if (state().lost) return true;
    return s->queue.empty() || s->queue.front().first > number;
}
void work_wait(std::unique_lock<std::mutex> &lock, const std::function<bool()> &done) {
    driver_state &d = state();
    d.n_waiting++;
    d.changed.notify_all();
    d.changed.wait(lock, [&] { return d.lost || done(); });
    d.n_waiting--;
}
void work_wait_all(std::unique_lock<std::mutex> &lock) {
    driver_state &d = state();
    uint64_t now = d.numbers;
    work_wait(lock, [&] {
        for (stream *s : d.streams) if (!work_done(s, now)) return false;
        return true;
    });
}
bool work_reads(const void *at, size_t n) {
    for (stream *s : state().streams)
        for (auto &queued : s->queue) {
            const op &what = queued.second;
            if (what.kind == op::COPY && what.from >= (const char *)at && what.from < (const char *)at + n) return true;
        }
    return false;
}
void work_lose(int code) {
    driver_state &d = state();
    d.lost = code;
    for (stream *s : d.streams)
        while (s->queue.size() > (s->running ? 1u : 0u)) s->queue.pop_back();
    d.changed.notify_all();
}

static bool value_is_there(const op &what) {
    uint32_t now = __atomic_load_n((const uint32_t *)what.to, __ATOMIC_ACQUIRE);
    switch (what.flags & 3) {
    case 0: return (int32_t)(now - what.value) >= 0;
    case 1: return now == what.value;
    case 2: return (now & what.value) != 0;
    default: return ~(now | what.value) != 0;
    }
}
/* Stream 0 waits for what was queued before in blocking streams, and they for it. */
static bool comes_first(const stream *s) {
    driver_state &d = state();
    if (s == &d.zero) {
        for (stream *other : d.streams)
            if (other != s && other->blocking && !other->queue.empty()
                && other->queue.front().first < s->queue.front().first) return false;
        return true;
    }
    return !s->blocking || d.zero.queue.empty() || d.zero.queue.front().first > s->queue.front().first;
}
static bool may_run(stream *s) {
    if (s->queue.empty() || s->running || !comes_first(s)) return false;
    const op &what = s->queue.front().second;
    if (what.kind == op::WAIT) return what.at->done;
    if (what.not_before > steady_clock::now()) return false;
    if (what.kind == op::WAIT_VALUE) {
        if (memory_place(what.to, 4) == DEVICE) memory_open(true);
        return value_is_there(what);
    }
    return true;
}
static void move_bytes(const op &what) {
    const char *from = what.from ? what.from : what.bytes.data();
    memmove(what.to, from, what.n);
}
static void fill(const op &what) {
    for (size_t i = 0; i < what.n; i++) memcpy(what.to + i * what.width, &what.value, what.width);
}
/* Without the lock. */
static void carry_out(op &what, uint32_t seed) {
    switch (what.kind) {
    case op::KERNEL:
        emu::launch(*what.kernel, what.grid, what.threads, what.shared, what.bytes.data(), seed);
        break;
    case op::COPY: move_bytes(what); break;
    case op::FILL: fill(what); break;
    case op::WRITE_VALUE: __atomic_store_n((uint32_t *)what.to, what.value, __ATOMIC_RELEASE); break;
    case op::HOST: what.call(what.data); break;
    default: break;
    }
}
static void account(const op &what) {
    driver_state &d = state();
    if (what.kind == op::COPY) d.copied += what.n;
    if (what.kind != op::KERNEL) return;
    d.kernels_run[what.kernel->name]++;
    if (++d.n_kernels != d.set.fail_at || d.set.fail_call != "kernel") return;
    if (d.set.fail_hangs) d.hung = true;
    else work_lose(d.set.fail_code ? d.set.fail_code : LAUNCH_FAILED);
}
/* A node of a graph whose nodes before it are done, at random. */
static size_t next_node(const graph_run &run) {
    std::vector<size_t> ready;
    for (size_t i = 0; i < run.ops.size(); i++) {
        bool may = !run.done[i];
        for (size_t before : run.after[i]) may &= run.done[before] != 0;
        if (may) ready.push_back(i);
    }
    return state().set.seed ? ready[state().random() % ready.size()] : ready[0];
}
/* Does the head of a stream, or one node of the graph that is there. */
static void step(std::unique_lock<std::mutex> &lock, stream *s) {
    driver_state &d = state();
    op &head = s->queue.front().second;
    graph_run *run = head.kind == op::GRAPH ? head.run.get() : nullptr;
    size_t i = run && run->n_done < run->ops.size() ? next_node(*run) : 0;
    op *what = !run ? &head : run->n_done < run->ops.size() ? &run->ops[i] : nullptr;
    bool ends = true;
    if (what) {
        account(*what);
        if (d.lost || d.hung) return;
        uint32_t seed = d.set.seed ? (uint32_t)d.random() | 1 : 0;
        s->running = true;
        memory_open(true);
        lock.unlock();
        carry_out(*what, seed);
        lock.lock();
        s->running = false;
        d.changed.notify_all();
        if (run) {
            run->done[i] = 1;
            ends = ++run->n_done == run->ops.size();
        }
    }
    if (ends) {
        if (head.kind == op::RECORD) {
            head.at->done = true;
            head.at->when = steady_clock::now();
        }
        s->queue.pop_front();
        d.changed.notify_all();
    }
}
static void work_loop() {
    driver_state &d = state();
    std::unique_lock<std::mutex> lock(d.lock);
    for (;;) {
        std::vector<stream *> ready, held;
        if (d.hung) {
            memory_open(false);
            d.changed.wait(lock, [&] { return !d.hung; });
        }
        auto now = steady_clock::now();
        bool polls = false;
        for (stream *s : d.streams) {
            if (d.lost) s->queue.clear();
            if (!s->queue.empty()) {
                const op &head = s->queue.front().second;
                polls |= head.kind == op::WAIT_VALUE || head.not_before > now;
            }
            if (may_run(s)) (s->held_until > now ? held : ready).push_back(s);
        }
        if (ready.empty() && d.n_waiting) ready.swap(held);
        if (d.set.copies_first)
            for (size_t i = 0; i < ready.size(); i++)
                if (!ready[i]->runs_kernels) ready = { ready[i] };
        if (!ready.empty()) {
            step(lock, d.set.seed ? ready[d.random() % ready.size()] : ready[0]);
            continue;
        }
        memory_open(false);
        if (!held.empty() || polls) d.changed.wait_for(lock, POLL);
        else d.changed.wait(lock);
    }
}
