//! Memory of this process: how much it may take, and what it no longer needs.

use std::path::{Path, PathBuf};

/// Bytes of memory that this process may take at most: what the machine has, or less where it, or a
/// group above it, is limited by a memory control group of either version.
///
/// A limit that can't be read is taken for none.
pub fn limit() -> u64 {
    let info = rustix::system::sysinfo();
    let machine = (info.totalram as u64).saturating_mul(info.mem_unit.into());
    let text = |path: &Path| std::fs::read_to_string(path).ok();
    let group = || {
        let groups = text(Path::new("/proc/self/cgroup"))?;
        let mounts = text(Path::new("/proc/self/mountinfo"))?;
        group_limit(&groups, &mounts, &text)
    };
    group().map_or(machine, |limit| limit.min(machine))
}

/// Bytes from which on memory is the kernel's, and goes back to it at once.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 256 << 10;

/// Has large pieces of memory go back to the kernel when they are let go, by whichever thread. By
/// itself the allocator would, after the first of them, have each thread keep its own.
#[cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "a call into the C library"))]
pub fn give_back_large() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it changes how the allocator works from here on, and no memory that is in use.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// Gives memory that is no longer used back to the kernel, which the allocator would keep: to read headers
/// and configs takes a multiple of what is kept of them.
#[cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "a call into the C library"))]
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes the allocator's own locks and changes no memory that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The lowest limit of the memory control groups that `groups`, the text of `/proc/self/cgroup`,
/// names, and of those above them, as far as `mounts`, the text of `/proc/self/mountinfo`, shows
/// them.
fn group_limit(groups: &str, mounts: &str, read: &dyn Fn(&Path) -> Option<String>) -> Option<u64> {
    let mut lowest: Option<u64> = None;
    for (version, group) in groups.lines().filter_map(memory_group) {
        for (top, group) in mounts.lines().filter_map(|line| place(line, version, group)) {
            for dir in group.ancestors().take_while(|dir| dir.starts_with(&top)) {
                for file in version.files() {
                    let limit = read(&dir.join(file)).and_then(|text| text.trim().parse().ok());
                    lowest = lowest.into_iter().chain(limit).min();
                }
            }
        }
    }
    lowest
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    /// Where a group's limits stand. No limit is `max`, or a number larger than any memory.
    fn files(self) -> &'static [&'static str] {
        match self {
            Self::One => &["memory.limit_in_bytes"],
            // Above `high` a group is slowed down until nothing moves.
            Self::Two => &["memory.max", "memory.high"],
        }
    }
}

/// The group that a line of `/proc/self/cgroup` names, if it limits memory: `4:cpu,memory:/a/b`, or
/// `0::/a/b` in version 2.
fn memory_group(line: &str) -> Option<(Version, &str)> {
    let mut fields = line.splitn(3, ':');
    let (number, controllers, group) = (fields.next()?, fields.next()?, fields.next()?);
    if controllers.split(',').any(|controller| controller == "memory") {
        Some((Version::One, group))
    } else {
        (number == "0" && controllers.is_empty()).then_some((Version::Two, group))
    }
}

/// Where a line of `/proc/self/mountinfo` shows a control group: the mountpoint, and the group's
/// directory below.
///
/// In a container the mountpoint may show a group in the middle of the tree, which then is the
/// line's root; of a group outside of it, no more than the mountpoint is seen.
fn place(line: &str, version: Version, group: &str) -> Option<(PathBuf, PathBuf)> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(3);
    let (root, top) = (unescaped(fields.next()?), PathBuf::from(unescaped(fields.next()?)));
    let mut fields = file_system.split(' ');
    let (kind, options) = (fields.next()?, fields.nth(1)?);
    let fits = match version {
        Version::One => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
        Version::Two => kind == "cgroup2",
    };
    let below = Path::new(group).strip_prefix(&root).unwrap_or(Path::new(""));
    // Seen from a namespace, a group outside of it is `/../..`.
    let below = if below.starts_with("..") { Path::new("") } else { below };
    fits.then(|| (top.clone(), top.join(below)))
}

/// A path as it is, of one whose spaces and the like are written `\040`.
fn unescaped(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out += before;
        let code = after.get(..3).and_then(|code| u8::from_str_radix(code, 8).ok());
        out.push(code.map_or('\\', char::from));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
31 25 0:28 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory
32 25 0:29 / /sys/fs/cgroup/cpu rw,nosuid shared:10 - cgroup cgroup rw,cpu,cpuacct
";
    const V2: &str = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    /// Version 1 counts no limit in whole pages.
    const NONE: &str = "9223372036854771712\n";

    #[track_caller]
    fn check(groups: &str, mounts: &str, files: &[(&str, &str)], expected: Option<u64>) {
        let read = |path: &Path| {
            let found = files.iter().find(|(name, _)| Path::new(name) == path);
            found.map(|(_, text)| (*text).to_owned())
        };
        assert_eq!(group_limit(groups, mounts, &read), expected);
    }

    #[test]
    fn the_lowest_limit_of_nested_groups_counts() {
        let groups = "4:cpu,cpuacct:/\n3:memory:/slurm/job_7/step_0\n0::/elsewhere\n";
        let file = |dir| format!("/sys/fs/cgroup/memory{dir}/memory.limit_in_bytes");
        let (top, outer, inner) = (file(""), file("/slurm/job_7"), file("/slurm/job_7/step_0"));
        let files = [(&*top, NONE), (&*outer, "1073741824\n"), (&*inner, NONE)];
        check(groups, V1, &files, Some(1 << 30));
        let groups = "0::/user.slice/app.scope\n";
        let files = [
            ("/sys/fs/cgroup/user.slice/memory.max", "2147483648\n"),
            ("/sys/fs/cgroup/user.slice/memory.high", "max\n"),
            ("/sys/fs/cgroup/user.slice/app.scope/memory.max", "max\n"),
            ("/sys/fs/cgroup/user.slice/app.scope/memory.high", "268435456\n"),
            ("/sys/fs/cgroup/other/memory.max", "4096\n"),
        ];
        check(groups, V2, &files, Some(256 << 20));
    }

    #[test]
    fn a_container_sees_its_group_at_the_mountpoint_or_from_above() {
        let at_top = [("/sys/fs/cgroup/memory/memory.limit_in_bytes", "268435456\n")];
        let bound = "50 40 0:28 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        check("3:memory:/docker/abc\n", bound, &at_top, Some(256 << 20));
        check("3:memory:/docker/other\n", bound, &at_top, Some(256 << 20));
        let inner = [("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "4096\n")];
        check("3:memory:/docker/abc/a\n", bound, &inner, Some(4096));
        let own = [("/sys/fs/cgroup/memory.max", "268435456\n")];
        check("0::/\n", V2, &own, Some(256 << 20));
        check("0::/../other\n", V2, &own, Some(256 << 20));
    }

    #[test]
    fn both_versions_side_by_side_count_together() {
        let unified = "30 25 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let groups = "3:memory:/job\n0::/job\n";
        let files = [
            ("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", "1073741824\n"),
            ("/sys/fs/cgroup/unified/job/memory.max", "max\n"),
        ];
        check(groups, &format!("{V1}{unified}"), &files, Some(1 << 30));
    }

    #[test]
    fn no_group_no_mount_and_odd_lines_are_no_limit() {
        check("", V2, &[], None);
        check("0::/a\n", "", &[("/sys/fs/cgroup/a/memory.max", "4096\n")], None);
        check("nonsense\n3:memory\n:::\n", "1 2 3\n - \nx - cgroup2\n", &[], None);
        check("0::/a\n", V2, &[("/sys/fs/cgroup/a/memory.max", "many\n")], None);
        let spaced = "31 25 0:28 / /my\\040groups rw - cgroup2 none rw\n";
        check("0::/\n", spaced, &[("/my groups/memory.max", "4096\n")], Some(4096));
    }
}
