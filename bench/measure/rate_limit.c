/* Preloaded into a rank: its writes to regular files go no faster than RANK_RATE_BYTES_PER_S, taken all together;
 * with RANK_RATE_PLACE only those to files below that directory.
 *
 * Who writes how does not matter: the C library's calls are replaced, so that C++, Python and any library are held alike, and
 * the programs that are measured stay as they are. A write is begun only once the time has passed that it and all those
 * before it take at that rate; time in which nothing was written is not saved up. What does not go through these
 * calls (mmap, splice, io_uring) is not limited. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static double free_at; /* seconds of CLOCK_MONOTONIC; guarded by the lock */

static double rate(void) {
  const char* text = getenv("RANK_RATE_BYTES_PER_S");
  return text ? strtod(text, NULL) : 0.0;
}

/* Whether the file lies where the limit holds: everywhere, or below RANK_RATE_PLACE. */
static int counts(int fd) {
  char link[64], path[4096];
  const char* place = getenv("RANK_RATE_PLACE");
  ssize_t length;
  if (!place) return 1;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  length = readlink(link, path, sizeof path - 1);
  return length > 0 && (size_t)length >= strlen(place) && strncmp(path, place, strlen(place)) == 0;
}

static void pay(int fd, double bytes) {
  struct stat status;
  struct timespec now, until;
  double seconds;
  const int before = errno;
  const double bytes_per_s = rate();
  if (bytes_per_s > 0 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && counts(fd)) {
    pthread_mutex_lock(&lock);
    clock_gettime(CLOCK_MONOTONIC, &now);
    seconds = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    if (free_at < seconds) free_at = seconds;
    free_at += bytes / bytes_per_s;
    until.tv_sec = (time_t)free_at;
    until.tv_nsec = (long)(1e9 * (free_at - (double)until.tv_sec));
    pthread_mutex_unlock(&lock);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR) continue;
  }
  errno = before;
}

static double sum(const struct iovec* pieces, int count) {
  double bytes = 0;
  int i;
  for (i = 0; i < count; ++i) bytes += (double)pieces[i].iov_len;
  return bytes;
}

/* NAME(types and names of its parameters)(names alone), of which BYTES are written. */
#define LIMITED(NAME, PARAMETERS, ARGUMENTS, BYTES)                \
  ssize_t NAME PARAMETERS {                                        \
    static ssize_t(*real) PARAMETERS;                              \
    if (!real) *(void**)&real = dlsym(RTLD_NEXT, #NAME);           \
    pay(fd, BYTES);                                                \
    return real ARGUMENTS;                                         \
  }

LIMITED(write, (int fd, const void* bytes, size_t count), (fd, bytes, count), (double)count)
LIMITED(pwrite, (int fd, const void* bytes, size_t count, off_t at), (fd, bytes, count, at), (double)count)
LIMITED(pwrite64, (int fd, const void* bytes, size_t count, off64_t at), (fd, bytes, count, at), (double)count)
LIMITED(writev, (int fd, const struct iovec* pieces, int count), (fd, pieces, count), sum(pieces, count))
LIMITED(pwritev, (int fd, const struct iovec* pieces, int count, off_t at), (fd, pieces, count, at), sum(pieces, count))
LIMITED(pwritev2, (int fd, const struct iovec* pieces, int count, off_t at, int flags), (fd, pieces, count, at, flags),
        sum(pieces, count))
LIMITED(pwritev64v2, (int fd, const struct iovec* pieces, int count, off64_t at, int flags), (fd, pieces, count, at, flags),
        sum(pieces, count))
LIMITED(pwritev64, (int fd, const struct iovec* pieces, int count, off64_t at), (fd, pieces, count, at), sum(pieces, count))
