/* What a binderfs answers to every operation on its tree, one line each.
 *
 *   cc -static -o walk walk.c && ./walk BINDERFS
 *
 * BINDERFS is a freshly mounted instance with stats=global. The program leaves it changed.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/android/binder.h>
#include <linux/android/binderfs.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

static const char *root;

static const char *at(const char *name)
{
	static char paths[4][4096];
	static unsigned next;
	char *path = paths[next++ % 4];

	snprintf(path, sizeof paths[0], "%s/%s", root, name);
	return path;
}

static long say(const char *what, long result)
{
	int error = errno;

	printf("%s -> %ld%s%s\n", what, result, result < 0 ? " " : "", result < 0 ? strerrorname_np(error) : "");
	fflush(stdout);
	return result;
}

#define TRY(expression) say(#expression, (long)(expression))

static void section(const char *title)
{
	printf("# %s\n", title);
	fflush(stdout);	/* before there is a child to say it again */
}

/* A name as C would write it, a long one by its beginning and length; the last four results stay. */
static const char *quoted(const char *name)
{
	static char texts[4][1200];
	static unsigned next;
	char *text = texts[next++ % 4], *end = text;
	size_t length = strlen(name);

	for (size_t i = 0; i < length && i < 40; i++)
		end += sprintf(end, name[i] > ' ' && name[i] < 127 ? "%c" : "\\x%02x", (unsigned char)name[i]);
	*end = 0;
	if (length > 40)
		sprintf(end, "... (%zu)", length);
	return text;
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
	return strcmp((*a)->d_name, (*b)->d_name);
}

static void list(const char *name)
{
	struct dirent **entries;
	int n = scandir(at(name), &entries, NULL, by_name);

	printf("list %s:", name);
	for (int i = 0; i < n; i++)
		printf(" %s", quoted(entries[i]->d_name));
	printf("%s\n", n < 0 ? strerrorname_np(errno) : "");
}

static void show(const char *name)
{
	struct stat st;

	if (lstat(at(name), &st)) {
		printf("stat %s: %s\n", name, strerrorname_np(errno));
		return;
	}
	printf("stat %s: mode=%04o nlink=%lu uid=%u gid=%u size=%lld blksize=%ld blocks=%lld\n", name,
	       st.st_mode & 07777, (unsigned long)st.st_nlink, st.st_uid, st.st_gid, (long long)st.st_size,
	       (long)st.st_blksize, (long long)st.st_blocks);
}

/* BINDER_CTL_ADD with these bytes; the name that comes back, and whether numbers do, is part of the answer. */
static int add_raw(const char *shown, const char *name, size_t size)
{
	struct binderfs_device device;
	int fd = open(at("binder-control"), O_RDONLY | O_CLOEXEC), result, error;

	memset(&device, 0, sizeof device);
	memcpy(device.name, name, size);
	result = ioctl(fd, BINDER_CTL_ADD, &device);
	error = errno;
	printf("add %s -> %d%s%s, major %s, minor %u, name %s\n", shown, result, result < 0 ? " " : "",
	       result < 0 ? strerrorname_np(error) : "", device.major ? "set" : "0", device.minor,
	       memchr(device.name, 0, sizeof device.name) ? quoted(device.name) : "without an end");
	close(fd);
	return result;
}

static int add(const char *name)
{
	return add_raw(quoted(name), name, strlen(name));
}

static int write_to(const char *name, int flags)
{
	int fd = open(at(name), flags | O_CLOEXEC);
	int result = fd < 0 ? -1 : write(fd, "x", 1), error = errno;

	if (fd >= 0)
		close(fd);
	errno = error;
	return result;
}

static int rename2(const char *from, const char *to, unsigned flags)
{
	return syscall(SYS_renameat2, AT_FDCWD, at(from), AT_FDCWD, at(to), flags);
}

static int child(int (*body)(void))
{
	int status;
	pid_t pid = fork();

	if (!pid) {
		if (setgid(1234) || setuid(1234))
			_exit(99);
		_exit(body());
	}
	waitpid(pid, &status, 0);
	return WEXITSTATUS(status);
}

static int as_nobody(void)
{
	TRY(open(at("binder"), O_RDWR));
	TRY(open(at("binder-control"), O_RDWR));
	TRY(open(at("features/extended_error"), O_RDONLY) < 0 ? -1 : 0);
	TRY(open(at("features/extended_error"), O_RDWR) < 0 ? -1 : 0);
	TRY(open(at("binder_logs/state"), O_RDONLY) >= 0 ? 0 : -1);
	TRY(unlink(at("binder")));
	TRY(rename(at("binder"), at("other")));
	TRY(chmod(at("binder"), 0666));
	TRY(chown(at("binder"), 1234, 1234));
	TRY(mkdir(at("d"), 0755));
	TRY(open(at("new"), O_CREAT | O_RDWR, 0600));
	TRY(access(at("binder"), R_OK));
	TRY(access(at("hwbinder"), R_OK | W_OK));
	TRY(access(at("features"), W_OK));
	TRY(access(at("features"), X_OK));
	return 0;
}

int main(int argc, char **argv)
{
	char b[4096], longname[301];
	struct stat st;
	struct statfs fs;
	struct timeval tv[2] = { { 1000, 0 }, { 2000, 0 } };
	int fd, other;

	if (argc != 2)
		return 2;
	/* From here on nobody needs to be let through to it. */
	if (chdir(argv[1]))
		return 1;
	root = ".";
	memset(longname, 'n', 300);
	longname[300] = 0;
	umask(0);

	section("what there is");
	list("");
	list("features");
	list("binder_logs");
	list("binder_logs/proc");
	show("");
	show("binder-control");
	show("binder");
	show("features");
	show("features/extended_error");
	show("binder_logs");
	show("binder_logs/state");
	show("binder_logs/proc");
	TRY(statfs(at(""), &fs));
	printf("statfs bsize %ld namelen %ld blocks %lu bfree %lu files %lu ffree %lu\n", (long)fs.f_bsize, (long)fs.f_namelen,
	       (unsigned long)fs.f_blocks, (unsigned long)fs.f_bfree, (unsigned long)fs.f_files, (unsigned long)fs.f_ffree);

	section("names that are not there");
	TRY(stat(at("nothing"), &st));
	TRY(open(at("nothing"), O_RDONLY));
	TRY(unlink(at("nothing")));
	TRY(rename(at("nothing"), at("something")));
	TRY(stat(at("binder/x"), &st));
	TRY(stat(at("features/x"), &st));
	TRY(stat(at("binder_logs/proc/1"), &st));
	TRY(stat(at("binder_logs/proc/x"), &st));
	TRY(stat(at(longname), &st));
	longname[255] = 0;
	TRY(stat(at(longname), &st));

	section("binder-control");
	fd = open(at("binder-control"), O_RDWR | O_CLOEXEC);
	TRY(fd < 0 ? -1 : 0);
	TRY(read(fd, b, 1));
	TRY(write(fd, "x", 1));
	TRY(pread(fd, b, 1, 0));
	TRY(lseek(fd, 0, SEEK_SET));
	TRY(lseek(fd, 10, SEEK_SET));
	TRY(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0));
	TRY(mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0));
	TRY(ftruncate(fd, 0));
	TRY(fsync(fd));
	TRY(fallocate(fd, 0, 0, 1));
	TRY(ioctl(fd, _IOR('b', 2, int), b));
	TRY(ioctl(fd, BINDER_VERSION, b));
	TRY(ioctl(fd, _IO('b', 1), 0));
	TRY(ioctl(fd, BINDER_CTL_ADD, NULL));
	TRY(ioctl(fd, BINDER_CTL_ADD, (void *)8));
	TRY(ioctl(fd, FS_IOC_GETFLAGS, b));
	close(fd);
	other = open(at("binder-control"), O_WRONLY | O_CLOEXEC | O_TRUNC | O_APPEND);
	TRY(other < 0 ? -1 : 0);
	close(other);
	TRY(open(at("binder-control"), O_RDONLY | O_DIRECTORY));
	TRY(open(at("binder-control"), O_RDWR | O_CREAT | O_EXCL, 0600));

	section("adding");
	add("one");
	add("one");
	add("binder");
	add("binder-control");
	add("features");
	add("binder_logs");
	add("");
	add(".");
	add("..");
	add("...");
	add("a/b");
	add("/");
	add("with space");
	add("new\nline");
	add("caf\xc3\xa9");
	add("bad\xff\xfe");
	add(longname);
	memset(b, 'm', 256);
	add_raw("256 m without a NUL", b, 256);
	add_raw("tail after NUL", "tail\0rest", 9);
	list("");
	show("one");
	TRY(unlink(at("caf\xc3\xa9")));
	TRY(unlink(at("bad\xff\xfe")));
	TRY(unlink(at("with space")));
	TRY(unlink(at("new\nline")));
	TRY(unlink(at("...")));
	TRY(unlink(at("tail")));
	TRY(unlink(at(longname)));
	memset(longname, 'm', 255);
	TRY(unlink(at(longname)));
	list("");

	section("opening devices");
	TRY(open(at("one"), O_RDONLY | O_DIRECTORY));
	TRY(open(at("one"), O_RDWR | O_CREAT | O_EXCL, 0600));
	fd = open(at("one"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	TRY(fd < 0 ? -1 : 0);
	TRY(read(fd, b, 1));
	TRY(pread(fd, b, 1, 0));
	TRY(write(fd, "x", 1));
	TRY(pwrite(fd, "x", 1, 0));
	TRY(lseek(fd, 0, SEEK_SET));
	TRY(ftruncate(fd, 0));
	TRY(ftruncate(fd, 10));
	TRY(fsync(fd));
	TRY(fallocate(fd, 0, 0, 1));
	TRY(ioctl(fd, BINDER_CTL_ADD, b));
	TRY(ioctl(fd, FIONREAD, b));
	TRY(flock(fd, LOCK_EX));
	TRY(fchmod(fd, 0640));
	show("one");
	TRY(fstat(fd, &st));
	printf("fstat mode=%04o\n", st.st_mode & 07777);
	TRY(unlink(at("one")));
	TRY(fstat(fd, &st));
	printf("fstat nlink=%lu\n", (unsigned long)st.st_nlink);
	TRY(ioctl(fd, BINDER_VERSION, b));
	close(fd);
	TRY(truncate(at("hwbinder"), 0));
	TRY(truncate(at("hwbinder"), 4096));
	fd = open(at("hwbinder"), O_RDONLY | O_CLOEXEC);
	TRY(ioctl(fd, BINDER_VERSION, b));
	close(fd);
	fd = open(at("hwbinder"), O_WRONLY | O_APPEND | O_CLOEXEC);
	TRY(ioctl(fd, BINDER_VERSION, b));
	close(fd);
	show("hwbinder");

	section("attributes");
	TRY(chmod(at("binder"), 0666));
	TRY(chown(at("binder"), 1000, 1001));
	show("binder");
	TRY(chmod(at("binder"), 04755));
	show("binder");
	TRY(utimes(at("binder"), tv));
	TRY(stat(at("binder"), &st));
	printf("times %ld %ld\n", (long)st.st_atime, (long)st.st_mtime);
	TRY(chmod(at("binder-control"), 0644));
	show("binder-control");
	TRY(chmod(at("features"), 0700));
	show("features");
	TRY(chmod(at("features"), 0755));
	TRY(chmod(at("features/extended_error"), 0666));
	TRY(chown(at("features/extended_error"), 7, 8));
	show("features/extended_error");
	TRY(chmod(at("binder_logs/state"), 0440));
	show("binder_logs/state");
	TRY(chmod(at("binder_logs/state"), 0444));
	TRY(chmod(at("."), 0711));
	show("");
	TRY(chmod(at("."), 0755));
	TRY(setxattr(at("binder"), "user.x", "1", 1, 0));
	TRY(getxattr(at("binder"), "user.x", b, 10));
	TRY(setxattr(at("features"), "user.x", "1", 1, 0));
	TRY(getxattr(at("features"), "user.x", b, 10));
	TRY(setxattr(at("features"), "trusted.x", "1", 1, 0));
	TRY(listxattr(at("features"), b, 10));
	TRY(removexattr(at("features"), "user.x"));
	TRY(chmod(at("binder"), 0600));
	TRY(chown(at("binder"), 0, 0));

	section("making things");
	TRY(mkdir(at("d"), 0755));
	TRY(mkdir(at("binder"), 0755));
	TRY(mkdir(at("features/d"), 0755));
	TRY(open(at("new"), O_CREAT | O_RDWR, 0600));
	TRY(open(at("features/new"), O_CREAT | O_RDWR, 0600));
	TRY(open(at("."), O_TMPFILE | O_RDWR, 0600));
	TRY(mknod(at("n"), S_IFREG | 0600, 0));
	TRY(mknod(at("n"), S_IFIFO | 0600, 0));
	TRY(mknod(at("n"), S_IFCHR | 0600, 0x0103));
	TRY(symlink("x", at("s")));
	TRY(link(at("binder"), at("l")));
	TRY(link(at("features/extended_error"), at("features/l")));
	TRY(link(at("features"), at("l")));

	section("removing things");
	TRY(unlink(at("binder-control")));
	TRY(unlink(at("features")));
	TRY(unlink(at("features/extended_error")));
	TRY(unlink(at("binder_logs/state")));
	TRY(rmdir(at("binder")));
	TRY(rmdir(at("features")));
	TRY(rmdir(at("binder_logs/proc")));
	TRY(rmdir(at("binder_logs")));
	TRY(rmdir(at(".")));

	section("renaming");
	add("two");
	add("three");
	TRY(rename(at("two"), at("second")));
	show("second");
	TRY(rename(at("second"), at("three")));
	show("second");
	show("three");
	add("four");
	TRY(rename2("four", "three", RENAME_NOREPLACE));
	TRY(rename2("four", "fourth", RENAME_NOREPLACE));
	TRY(rename2("fourth", "three", RENAME_EXCHANGE));
	TRY(rename2("fourth", "absent", RENAME_EXCHANGE));
	TRY(rename2("fourth", "w", RENAME_WHITEOUT));
	TRY(rename(at("fourth"), at("fourth")));
	TRY(rename(at("binder-control"), at("control")));
	TRY(rename(at("fourth"), at("binder-control")));
	TRY(rename2("fourth", "binder-control", RENAME_EXCHANGE));
	TRY(rename(at("fourth"), at("features")));
	TRY(rename(at("features"), at("fourth")));
	TRY(rename(at("features/extended_error"), at("features/x")));
	TRY(rename(at("features/extended_error"), at("x")));
	TRY(rename(at("binder_logs/state"), at("binder_logs/x")));
	TRY(rename(at("binder_logs/proc"), at("binder_logs/x")));
	memset(longname, 'l', 300);
	longname[300] = 0;
	TRY(rename(at("fourth"), at(longname)));
	TRY(rename(at("fourth"), "/tmp/elsewhere"));
	TRY(rename(at("fourth"), at("features/fourth")));
	list("features");
	show("features/fourth");
	fd = open(at("features/fourth"), O_RDWR | O_CLOEXEC);
	TRY(ioctl(fd, BINDER_VERSION, b));
	close(fd);
	TRY(rename(at("features/fourth"), at("back")));
	TRY(unlink(at("features/fourth")));
	TRY(rename(at("features"), at("features/in-itself")));
	TRY(rename(at("features"), at("traits")));
	list("");
	list("traits");
	show("");
	TRY(rename2("traits", "binder_logs", RENAME_EXCHANGE));
	list("traits");
	TRY(rename2("traits", "binder_logs", RENAME_EXCHANGE));
	TRY(rename(at("traits"), at("binder_logs")));
	TRY(rename(at("traits"), at("features")));
	TRY(rename2("hwbinder", "features", RENAME_EXCHANGE));
	list("hwbinder");
	show("");
	TRY(rename2("hwbinder", "features", RENAME_EXCHANGE));
	add("features");
	list("");

	section("files");
	fd = open(at("features/extended_error"), O_RDONLY | O_CLOEXEC);
	TRY(read(fd, b, 1));
	TRY(read(fd, b, 10));
	TRY(read(fd, b, 10));
	TRY(lseek(fd, 1, SEEK_SET));
	TRY(read(fd, b, 10));
	TRY(lseek(fd, 0, SEEK_END));
	TRY(lseek(fd, 5, SEEK_CUR));
	TRY(pread(fd, b, 10, 0));
	TRY(pread(fd, b, 10, 1));
	TRY(pread(fd, b, 10, 2));
	TRY(pread(fd, b, 10, 100));
	TRY(write(fd, "x", 1));
	TRY(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0));
	TRY(mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0));
	TRY(ioctl(fd, BINDER_VERSION, b));
	TRY(ioctl(fd, BINDER_CTL_ADD, b));
	TRY(ioctl(fd, FS_IOC_GETFLAGS, b));
	close(fd);
	TRY(write_to("features/extended_error", O_WRONLY));
	TRY(write_to("binder_logs/state", O_RDWR));
	TRY(write_to("binder_logs/state", O_WRONLY | O_APPEND));
	fd = open(at("binder_logs/state"), O_RDONLY | O_CLOEXEC);
	TRY(read(fd, b, 3));
	TRY(read(fd, b, 100));
	TRY(read(fd, b, 100));
	TRY(lseek(fd, 0, SEEK_SET));
	TRY(read(fd, b, 100));
	TRY(lseek(fd, -3, SEEK_CUR));
	TRY(lseek(fd, 0, SEEK_END));
	TRY(lseek(fd, 0, SEEK_DATA));
	TRY(lseek(fd, -1, SEEK_SET));
	TRY(pread(fd, b, 100, 5));
	TRY(ftruncate(fd, 0));
	close(fd);
	TRY(truncate(at("binder_logs/state"), 10));
	show("binder_logs/state");
	TRY(truncate(at("binder_logs/state"), 0));
	TRY(truncate(at("features/extended_error"), 1));
	show("features/extended_error");
	TRY(truncate(at("features/extended_error"), 0));
	TRY(truncate(at("features"), 0));
	TRY(open(at("features/extended_error"), O_RDONLY | O_DIRECTORY));
	TRY(open(at("features"), O_RDWR));
	TRY(open(at("features"), O_RDONLY | O_DIRECTORY | O_CREAT, 0600));
	fd = open(at("features"), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	TRY(ioctl(fd, FS_IOC_GETFLAGS, b));
	TRY(ioctl(fd, BINDER_VERSION, b));
	close(fd);
	TRY(access(at("features/extended_error"), X_OK));

	section("processes");
	fd = open(at("binder"), O_RDWR | O_CLOEXEC);
	snprintf(b, sizeof b, "binder_logs/proc/%d", getpid());
	TRY(stat(at(b), &st));
	printf("mode %04o\n", st.st_mode & 07777);
	other = open(at("hwbinder"), O_RDWR | O_CLOEXEC);
	TRY(stat(at(b), &st));
	int log = open(at(b), O_RDONLY | O_CLOEXEC);
	TRY(read(log, b, 18));
	snprintf(b, sizeof b, "binder_logs/proc/%d", getpid());
	TRY(unlink(at(b)));
	TRY(chmod(at(b), 0400));
	TRY(rename(at(b), at("binder_logs/proc/x")));
	close(fd);
	fd = open(at("vndbinder"), O_RDWR | O_CLOEXEC);
	close(fd);
	close(other);

	section("without rights");
	child(as_nobody);

	section("the default devices go too");
	TRY(unlink(at("vndbinder")));
	TRY(unlink(at("binder")));
	list("");
	add("vndbinder");
	list("");
	return 0;
}
