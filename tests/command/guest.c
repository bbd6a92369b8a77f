/* What a program can do where there is binder in the kernel, and over FUSE only with `mount.py run`: calls with NULL for an
 * argument, and mounts of its own. Prints a line for each.
 *
 *   cc -static -o guest guest.c && ./guest
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/android/binder.h>
#include <linux/android/binderfs.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static char folder[] = "/tmp/guest-XXXXXX";

static long say(const char *what, long result)
{
	int error = errno;

	printf("%s -> %ld%s%s\n", what, result, result < 0 ? " " : "", result < 0 ? strerrorname_np(error) : "");
	fflush(stdout);
	return result;
}

#define TRY(expression) say(#expression, (long)(expression))

/* A heading, out at once: a child would say it again. */
static void section(const char *title)
{
	printf("# %s\n", title);
	fflush(stdout);
}

static int add(const char *binderfs, const char *name)
{
	struct binderfs_device device = { 0 };
	char path[256];
	int fd, result;

	strncpy(device.name, name, BINDERFS_MAX_NAME);
	snprintf(path, sizeof path, "%s/binder-control", binderfs);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return fd;
	result = ioctl(fd, BINDER_CTL_ADD, &device);
	close(fd);
	return result;
}

static int there(const char *path)
{
	return access(path, F_OK);
}

/* Run in a child, as another user with `uid` not 0; its output is in order, since its end is waited for. */
static void in_child(unsigned uid, void (*body)(void))
{
	pid_t child = fork();

	if (!child) {
		if (uid && (setgid(uid) || setuid(uid)))
			_exit(99);
		body();
		_exit(0);
	}
	waitpid(child, NULL, 0);
}

static void without_rights(void)
{
	TRY(mount("binder", "inner", "binder", 0, NULL));
	TRY(mount("binder", "inner", "binder", 0, "foo"));
	TRY(mount("binder", "nothing", "binder", 0, NULL));
	TRY(mount("binder", "private/inner", "binder", 0, NULL));
	TRY(mount("binder", "private/nothing", "binder", 0, NULL));
	TRY(mount("binder", "/proc/version", "binder", 0, NULL));
}

/* Who may mount, and is let into no directory for it. */
static void with_one_right(void)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2] = { 0 };

	data[0].effective = data[0].permitted = 1 << CAP_SETUID | 1 << CAP_SYS_ADMIN;
	if (prctl(PR_SET_KEEPCAPS, 1) || setuid(1234) || syscall(SYS_capset, &header, data))
		_exit(99);
	TRY(mount("binder", "private/inner", "binder", 0, NULL));
	TRY(mount("binder", "inner", "binder", 0, NULL));
	TRY(umount("inner"));
}

/* Enter a user namespace, in which root's number is this. */
static void enter_user_namespace(const char *uid)
{
	char line[32];
	int fd;

	TRY(unshare(CLONE_NEWUSER | CLONE_NEWNS));
	/* Who is nobody here has no right to the folder, but to mount he needs none. */
	fd = open("/proc/self/setgroups", O_WRONLY);
	TRY(write(fd, "deny", 4));
	close(fd);
	snprintf(line, sizeof line, "%s 0 1", uid);
	fd = open("/proc/self/uid_map", O_WRONLY);
	TRY(write(fd, line, strlen(line)));
	close(fd);
	fd = open("/proc/self/gid_map", O_WRONLY);
	TRY(write(fd, line, strlen(line)));
	close(fd);
}

static void from_below(void)
{
	enter_user_namespace("0");
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT, "max=9,stats=global"));
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT, "foo"));
}

static void without_root(void)
{
	struct stat st;

	enter_user_namespace("1000");
	TRY(mount("binder", "inner", "binder", 0, NULL));
	TRY(stat("inner/binder", &st));
	printf("owner without root %u\n", st.st_uid);
	fflush(stdout);
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT, "max=9"));
	TRY(umount("inner"));
}

/* What the data of mount(2) may be, and a number for the flags. */
static void data_and_flags(void)
{
	static const char *const data[] = {
		"ro", "rw", "sync", "async", "dirsync", "lazytime", "nolazytime", "mand", "nomand", "iversion",
		"ro=5", "sync=x", "silent", "loud", "nosuid", "noatime", "relatime", "defaults", "remount", "nofail",
		"x-y=1", "user_id=0", "context=x", "source=x", "=x", "=", ",,max=5,,", "max=5,max=9", "max", "max=",
		"max=08", "max= 5", "max=5\n", "max=\"5\"", "max=1048577", "MAX=5", "stats", "stats=", "stats=unset",
		"stats=global,ro", "\"max=5,stats=global\"", "mode=0666", "uid=0", "gid=0", "allow_other",
		"noallow_other", "devices=a", "region=auto", "secctx=x", "priority=kernel", "seccomp",
		"limit_opens=1", "log=log", "log_level=debug",
	};
	static const unsigned long flags[] = {
		MS_NOSUID | MS_NODEV | MS_NOEXEC, MS_SYNCHRONOUS | MS_DIRSYNC | MS_MANDLOCK | MS_LAZYTIME, MS_SILENT,
		MS_NOATIME | MS_NODIRATIME, MS_STRICTATIME, MS_RELATIME, MS_I_VERSION, MS_KERNMOUNT, MS_ACTIVE, MS_NOUSER,
		0xc0ed0000, 0xc0ed0000 | MS_RDONLY,
	};
	char what[80], shown[64], *newline;
	unsigned i;

	for (i = 0; i < sizeof data / sizeof *data; i++) {
		snprintf(shown, sizeof shown, "%s", data[i]);
		if ((newline = strchr(shown, '\n')))
			*newline = '$';
		snprintf(what, sizeof what, "data %s", shown);
		if (!say(what, mount("binder", "inner", "binder", 0, data[i])))
			umount2("inner", MNT_DETACH);
	}
	TRY(mount(NULL, "inner", "binder", 0, "source=x,max=5"));
	TRY(umount("inner"));
	TRY(mount(NULL, "inner", "binder", 0, "source=x,source=y"));
	TRY(mount("", "inner", "binder", 0, NULL));
	TRY(umount("inner"));
	for (i = 0; i < sizeof flags / sizeof *flags; i++) {
		snprintf(what, sizeof what, "flags %lx", flags[i]);
		if (!say(what, mount("binder", "inner", "binder", flags[i], NULL)))
			umount2("inner", MNT_DETACH);
	}
}

static void changes(void)
{
	TRY(chmod("inner/binder", 0666));
	TRY(chown("inner/binder", 1, 1));
	TRY(utimensat(AT_FDCWD, "inner/binder", NULL, 0));
	TRY(truncate("inner/binder", 0));
	TRY(rename("inner/binder", "inner/other"));
	TRY(rename("inner/binder-control", "inner/other"));
	TRY(unlink("inner/hwbinder"));
	TRY(unlink("inner/binder-control"));
	TRY(mkdir("inner/directory", 0755));
	TRY(mknod("inner/pipe", S_IFIFO | 0600, 0));
	TRY(symlink("binder", "inner/symlink"));
	TRY(link("inner/binder", "inner/link"));
	TRY(open("inner/new", O_CREAT | O_RDWR, 0600));
	TRY(open("inner/binder_logs/state", O_RDWR));
}

static void read_only(void)
{
	int fd;

	TRY(mount("binder", "inner", "binder", MS_RDONLY, "stats=global"));
	changes();
	TRY(add("inner", "added"));
	TRY(add("inner", "added"));
	fd = open("inner/added", O_RDWR | O_CLOEXEC);
	TRY(ioctl(fd, BINDER_SET_CONTEXT_MGR, NULL));
	close(fd);
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT, "stats=global"));
	TRY(unlink("inner/added"));
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT, "stats=global,ro"));
	TRY(unlink("inner/vndbinder"));
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT | MS_RDONLY, "stats=global,rw"));
	TRY(unlink("inner/vndbinder"));
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT | MS_RDONLY, "stats=global,foo"));
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT, "stats=global,sync,source=x"));
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT | MS_RDONLY, "max=9"));
	fd = open("inner/vndbinder", O_RDWR | O_CLOEXEC);
	TRY(unlink("inner/vndbinder"));
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT | MS_RDONLY, "stats=global"));
	close(fd);
	TRY(mount(NULL, "inner", NULL, 0xc0ed0000 | MS_REMOUNT | MS_RDONLY, "stats=global"));
	TRY(unlink("inner/binder"));
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT, "stats=global"));
	changes();
	TRY(mount(NULL, "inner/features", NULL, MS_REMOUNT, "stats=global"));
	TRY(mount(NULL, "nothing", NULL, MS_REMOUNT, "stats=global"));
	TRY(mount(NULL, "inner", "tmpfs", MS_REMOUNT, "stats=global"));
	in_child(0, from_below);
	TRY(umount2("inner", MNT_DETACH));
}

static void in_user_namespace(void)
{
	struct binder_version version;
	struct stat st;
	int fd;

	enter_user_namespace("0");
	TRY(mount("binder", "inner", "binder", 0, NULL));
	TRY(stat("inner/binder", &st));
	printf("owner %u\n", st.st_uid);
	TRY(add("inner", "deep"));
	fd = open("inner/deep", O_RDWR | O_CLOEXEC);
	TRY(ioctl(fd, BINDER_VERSION, &version));
	TRY(ioctl(fd, BINDER_SET_CONTEXT_MGR, NULL));
	TRY(ioctl(fd, BINDER_SET_CONTEXT_MGR, NULL));
	close(fd);
	TRY(umount("inner"));
}

static void in_another_root(void)
{
	TRY(chroot("."));
	TRY(mount("binder", "/inner", "binder", 0, NULL));
	TRY(there("/inner/binder-control"));
	TRY(umount("/inner"));
}

int main(void)
{
	struct binder_version version;
	char line[256], found = 0;
	FILE *file;
	int fd, null;

	if (!mkdtemp(folder) || chdir(folder) || mkdir("inner", 0755) || chmod(".", 0755) || mkdir("private", 0700) ||
	    mkdir("private/inner", 0755))
		return 1;

	file = fopen("/proc/filesystems", "r");
	while (file && fgets(line, sizeof line, file))
		found |= !strcmp(line, "nodev\tbinder\n");
	if (file)
		fclose(file);
	printf("/proc/filesystems names binder: %d\n", found);

	section("NULL for an argument");
	fd = open("/dev/binderfs/binder", O_RDWR | O_CLOEXEC);
	TRY(ioctl(fd, BINDER_SET_CONTEXT_MGR, NULL));
	TRY(ioctl(fd, BINDER_SET_CONTEXT_MGR, NULL));
	TRY(ioctl(fd, BINDER_THREAD_EXIT, NULL));
	TRY(ioctl(fd, BINDER_VERSION, NULL));
	TRY(ioctl(fd, BINDER_SET_MAX_THREADS, NULL));
	TRY(ioctl(fd, BINDER_VERSION, &version));
	null = open("/dev/null", O_RDWR | O_CLOEXEC);
	TRY(ioctl(null, BINDER_SET_CONTEXT_MGR, NULL));
	TRY(ioctl(-1, BINDER_THREAD_EXIT, NULL));
	close(null);
	close(fd);

	section("mounts");
	TRY(mount("binder", "inner", "binder", 0, NULL));
	TRY(there("inner/binder"));
	TRY(there("inner/binder_logs"));
	TRY(add("inner", "mine"));
	fd = open("inner/mine", O_RDWR | O_CLOEXEC);
	TRY(ioctl(fd, BINDER_SET_CONTEXT_MGR, NULL));
	TRY(ioctl(fd, BINDER_SET_CONTEXT_MGR, NULL));
	TRY(umount("inner"));
	close(fd);
	TRY(umount2("inner", MNT_DETACH));
	TRY(there("inner/binder"));
	TRY(umount("inner"));
	snprintf(line, sizeof line, "%s/inner", folder);
	TRY(mount(NULL, line, "binder", MS_NOSUID | MS_NOATIME, "max=4,stats=global"));
	TRY(there("inner/binder_logs/state"));
	TRY(add("inner", "a"));
	TRY(add("inner", "b"));
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT, "max=5,stats=global"));
	TRY(add("inner", "b"));
	TRY(mount(NULL, "inner", "binder", MS_REMOUNT, "max=5"));
	TRY(mount(NULL, "inner", "binder", MS_REMOUNT, "max=no,stats=global"));
	TRY(mount(NULL, "inner", "binder", MS_REMOUNT, "stats=global"));
	TRY(add("inner", "c"));
	TRY(mount("binder", "inner", "binder", 0, NULL));
	TRY(there("inner/c"));
	TRY(umount("inner"));
	TRY(there("inner/c"));
	TRY(umount("inner"));

	section("mounts that fail");
	TRY(mount("binder", "inner", "binder", 0, "max=2"));
	TRY(mount("binder", "inner", "binder", 0, "max=-1"));
	TRY(mount("binder", "inner", "binder", 0, "foo"));
	TRY(mount("binder", "nothing", "binder", 0, NULL));
	TRY(mount("binder", "/proc/version", "binder", 0, NULL));
	TRY(mount("binder", NULL, "binder", 0, NULL));
	TRY(mount("binder", "inner", (void *)8, 0, NULL));
	TRY(mount("binder", "inner", "binder", 0, (void *)8));
	TRY(mount("binder", "inner", "bindery", 0, NULL));
	in_child(1234, without_rights);

	in_child(0, with_one_right);
	TRY(mount("binder", "nothing", "binder", MS_NOUSER, NULL));
	TRY(mount("binder", "/proc/version", "binder", 0, "foo"));

	section("what can be said of a mount");
	data_and_flags();

	section("read-only");
	read_only();

	section("mounts of other types");
	TRY(mount("tmpfs", "inner", "tmpfs", 0, "size=4k"));
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT | MS_RDONLY, NULL));
	TRY(open("inner/x", O_CREAT | O_WRONLY, 0600));
	TRY(umount("inner"));
	TRY(mount("/dev/binderfs", "inner", "binder", MS_BIND, NULL));
	TRY(there("inner/binder"));
	TRY(umount("inner"));

	section("elsewhere");
	in_child(0, in_user_namespace);
	in_child(0, without_root);
	in_child(0, in_another_root);
	TRY(rmdir("inner"));
	TRY(rmdir("private/inner"));
	TRY(rmdir("private"));
	TRY(rmdir(folder));
	return 0;
}
