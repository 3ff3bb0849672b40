/* The ceiling of disk.py: random pages of a file, past the page cache, as many at once as `depth`.
 *
 * read_pages returns the seconds between the first request and the last answer, or -1 when this way of reading is not
 * to be had (no O_DIRECT, io_uring switched off). Pages are read into `depth` buffers and thrown away. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096

typedef struct {
    int fd, failed;
    const int64_t *pages;
    int64_t count, next;
    pthread_barrier_t start;
} Work;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void *reader(void *given) {
    Work *work = given;
    void *buffer;
    if (posix_memalign(&buffer, PAGE, PAGE)) work->failed = 1;
    pthread_barrier_wait(&work->start);
    for (int64_t i; !work->failed && (i = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->count;)
        if (pread(work->fd, buffer, PAGE, work->pages[i] * PAGE) <= 0) work->failed = 1;
    free(buffer);
    return NULL;
}

static double by_threads(Work *work, int depth) {
    pthread_t *threads = malloc(sizeof *threads * depth);
    pthread_barrier_init(&work->start, NULL, depth + 1);
    for (int i = 0; i < depth; i++)
        if (pthread_create(threads + i, NULL, reader, work)) abort();
    pthread_barrier_wait(&work->start);
    double began = now();
    for (int i = 0; i < depth; i++) pthread_join(threads[i], NULL);
    double spent = now() - began;
    free(threads);
    return spent;
}

static double by_uring(Work *work, int depth) {
    struct io_uring_params p;
    memset(&p, 0, sizeof p);
    int ring = syscall(__NR_io_uring_setup, depth, &p);
    if (ring < 0) { work->failed = 1; return -1; }
    size_t sq_bytes = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    size_t cq_bytes = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    size_t sqe_bytes = p.sq_entries * sizeof(struct io_uring_sqe);
    int access = PROT_READ | PROT_WRITE, kind = MAP_SHARED | MAP_POPULATE;
    char *sq = mmap(0, sq_bytes, access, kind, ring, IORING_OFF_SQ_RING);
    char *cq = mmap(0, cq_bytes, access, kind, ring, IORING_OFF_CQ_RING);
    struct io_uring_sqe *sqes = mmap(0, sqe_bytes, access, kind, ring, IORING_OFF_SQES);
    unsigned *sq_tail = (unsigned *)(sq + p.sq_off.tail), *sq_array = (unsigned *)(sq + p.sq_off.array);
    unsigned sq_mask = *(unsigned *)(sq + p.sq_off.ring_mask), cq_mask = *(unsigned *)(cq + p.cq_off.ring_mask);
    unsigned *cq_head = (unsigned *)(cq + p.cq_off.head), *cq_tail = (unsigned *)(cq + p.cq_off.tail);
    struct io_uring_cqe *cqes = (struct io_uring_cqe *)(cq + p.cq_off.cqes);
    char *buffers;
    if (posix_memalign((void **)&buffers, PAGE, (size_t)PAGE * depth)) abort();
    int *free_slots = malloc(sizeof(int) * depth), slots = depth;
    for (int i = 0; i < depth; i++) free_slots[i] = i;
    int64_t asked = 0, answered = 0;
    double began = now();
    while (answered < work->count && !work->failed) {
        unsigned added = 0;
        for (; slots && asked < work->count; added++) {
            unsigned tail = *sq_tail, place = tail & sq_mask;
            int slot = free_slots[--slots];
            memset(sqes + place, 0, sizeof *sqes);
            sqes[place].opcode = IORING_OP_READ;
            sqes[place].fd = work->fd;
            sqes[place].addr = (uint64_t)(uintptr_t)(buffers + (size_t)PAGE * slot);
            sqes[place].len = PAGE;
            sqes[place].off = work->pages[asked++] * PAGE;
            sqes[place].user_data = slot;
            sq_array[place] = place;
            __atomic_store_n(sq_tail, tail + 1, __ATOMIC_RELEASE);
        }
        if (syscall(__NR_io_uring_enter, ring, added, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0) work->failed = 1;
        unsigned head = *cq_head;
        for (; head != __atomic_load_n(cq_tail, __ATOMIC_ACQUIRE); head++, answered++) {
            if (cqes[head & cq_mask].res <= 0) work->failed = 1;
            free_slots[slots++] = cqes[head & cq_mask].user_data;
        }
        __atomic_store_n(cq_head, head, __ATOMIC_RELEASE);
    }
    double spent = now() - began;
    munmap(sq, sq_bytes);
    munmap(cq, cq_bytes);
    munmap(sqes, sqe_bytes);
    close(ring);
    free(buffers);
    free(free_slots);
    return spent;
}

double read_pages(const char *path, const int64_t *pages, int64_t count, int way, int depth) {
    Work work = {.fd = open(path, O_RDONLY | O_DIRECT), .pages = pages, .count = count};
    if (work.fd < 0) return -1;
    double spent = way ? by_threads(&work, depth) : by_uring(&work, depth);
    close(work.fd);
    return work.failed ? -1 : spent;
}
