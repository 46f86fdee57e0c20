/* Makes reads or writes of files in a folder fail, as those of a broken or full disk do.

   Preloaded into a run. CHAOS_FOLDER names the folder. While the file $CHAOS_FLAG.reads (or
   .writes) exists, calls fail. It holds a number: after so many failures it is removed; and the
   number of the error, EIO where there is none. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int fails(int fd, const char *kind) {
  static int count = 0;
  char link[64], path[4096], flag[4096];
  const char *folder = getenv("CHAOS_FOLDER"), *base = getenv("CHAOS_FLAG");
  if (!folder || !base) return 0;
  snprintf(flag, sizeof flag, "%s.%s", base, kind);
  if (access(flag, F_OK)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  if (strncmp(path, folder, strlen(folder))) return 0;
  FILE *file = fopen(flag, "r");
  int limit = 0, number = EIO;
  if (!file) return 0;
  int found = fscanf(file, "%d %d", &limit, &number);
  fclose(file);
  if (found < 1) return 0;  /* it is being written */
  if (__sync_add_and_fetch(&count, 1) >= limit) unlink(flag);
  errno = number;
  return 1;
}

#define WRAP_AS(type, kind, name, declared, passed) \
  type name declared {                              \
    static type(*real) declared;                    \
    if (!real) real = dlsym(RTLD_NEXT, #name);      \
    return fails(fd, kind) ? -1 : real passed;      \
  }
#define WRAP(kind, name, declared, passed) WRAP_AS(ssize_t, kind, name, declared, passed)
WRAP("reads", read, (int fd, void *buffer, size_t size), (fd, buffer, size))
WRAP("reads", pread, (int fd, void *buffer, size_t size, off_t at), (fd, buffer, size, at))
WRAP("reads", pread64, (int fd, void *buffer, size_t size, off64_t at), (fd, buffer, size, at))
WRAP("writes", write, (int fd, const void *buffer, size_t size), (fd, buffer, size))
WRAP("writes", pwrite, (int fd, const void *buffer, size_t size, off_t at), (fd, buffer, size, at))
WRAP("writes", pwrite64, (int fd, const void *buffer, size_t size, off64_t at), (fd, buffer, size, at))
WRAP("writes", writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
WRAP_AS(int, "writes", fsync, (int fd), (fd))
WRAP_AS(int, "writes", fdatasync, (int fd), (fd))
