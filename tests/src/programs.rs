//! Programs that people use, run inside namespaces: nginx, curl, socat, dnsmasq, vsftpd, iperf3, tcpdump.
//!
//! Servers answer with their name, so that a test can tell who answered. Each program has its own configuration, in a
//! directory of its own, and ends with its owner, by its process number.

use std::{
    fs::{self, Permissions},
    io::{BufRead, BufReader, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    sync::LazyLock,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    netns::{Namespace, Process},
    wait,
};

/// An nginx on the ports 80, 8080 and 10087 (for how-to's) of all addresses.
///
/// `/` answers with the server's name and a line end; `/big` is a file whose content [`is_big_file`] knows; `PUT` to
/// `/upload` takes anything; `/slow` is `/big` at one MiB in a second.
#[derive(Debug)]
pub struct Nginx {
    _process: Process,
    _prefix: TempDir,
}

impl Nginx {
    /// Starts it and waits until it listens.
    pub fn start(namespace: &Namespace, name: &str) -> Result<Self> {
        let prefix = TempDir::new()?;
        let directory = prefix.path().display().to_string();
        fs::create_dir(prefix.path().join("root"))?;
        write_big_file(&prefix.path().join("root/big"))?;
        let configuration = format!(
            r#"
daemon off;
master_process off;
user root;
pid {directory}/pid;
error_log stderr crit;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    client_max_body_size 0;
    sendfile on;
    server {{
        listen 0.0.0.0:80;
        listen [::]:80;
        listen 0.0.0.0:8080;
        listen [::]:8080;
        listen 0.0.0.0:10087;
        root {directory}/root;
        add_header Server-Name {name};
        location = / {{ return 200 "{name}\n"; }}
        location = /big {{ }}
        location = /slow {{ limit_rate 1m; alias {directory}/root/big; }}
        location = /upload {{ proxy_method GET; proxy_pass_request_body off; proxy_set_header Content-Length ""; proxy_pass http://127.0.0.1:80/; }}
    }}
}}
"#
        );
        let file = prefix.path().join("nginx.conf");
        fs::write(&file, configuration)?;
        let mut command = namespace.command("nginx");
        command.arg("-p").arg(prefix.path()).arg("-c").arg(&file).args(["-e", "stderr"]);
        let mut process = Process::spawn(&mut command)?;
        wait_for_port(namespace, 80, &mut process)?;
        Ok(Self { _process: process, _prefix: prefix })
    }
}

/// Bytes of [`Nginx`]'s big file.
pub const BIG_FILE: usize = 24 << 20;

/// Its content: each four bytes hold their own number.
static BIG: LazyLock<Vec<u8>> = LazyLock::new(|| (0..BIG_FILE / 4).flat_map(|number| (number as u32).to_be_bytes()).collect());

fn write_big_file(path: &Path) -> Result<()> {
    fs::write(path, &*BIG).with_context(|| format!("write {}", path.display()))
}

/// Whether a file is a whole copy of the big one.
pub fn is_big_file(path: &Path) -> Result<()> {
    let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    ensure!(bytes.len() == BIG_FILE, "{} has {} of {BIG_FILE} bytes", path.display(), bytes.len());
    if bytes != *BIG {
        let damaged = bytes.iter().zip(&*BIG).position(|(is, was)| is != was);
        bail!("{} is damaged at byte {damaged:?}", path.display());
    }
    Ok(())
}

fn wait_for_port(namespace: &Namespace, port: u16, process: &mut Process) -> Result<()> {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let mut ended = None;
    wait::until(&format!("a server on port {port}"), wait::SOON, || {
        ended = process.ended().ok().flatten();
        ended.is_some() || namespace.enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok())
    })?;
    ended.map_or(Ok(()), |status| bail!("the server for port {port} ended at once: {status}"))
}

/// `http://ADDRESS/PATH`, with brackets around IPv6.
pub fn url(address: IpAddr, path: &str) -> String {
    format!("http://{}/{path}", host(address))
}

/// An address as it stands before a port: with brackets around IPv6.
pub fn host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

const CURL: [&str; 5] = ["--silent", "--show-error", "--fail", "--noproxy", "*"];

/// Fetches `/` with curl and returns the answer without its line end: the name of who answered.
pub fn curl(client: &Namespace, address: IpAddr) -> Result<String> {
    let url = url(address, "");
    let text = client.run("curl", CURL.into_iter().chain(["--max-time", "10", &url]))?;
    Ok(text.trim_end().to_owned())
}

/// The same from a port of the server.
pub fn curl_port(client: &Namespace, address: IpAddr, port: u16) -> Result<String> {
    let url = format!("http://{}:{port}/", host(address));
    let text = client.run("curl", CURL.into_iter().chain(["--max-time", "10", &url]))?;
    Ok(text.trim_end().to_owned())
}

/// Fetches `/` so many times, one connection after the other, and returns who answered.
pub fn curl_times(client: &Namespace, address: IpAddr, times: usize) -> Result<Vec<String>> {
    (0..times).map(|_| curl(client, address)).collect()
}

/// A download of `/big` or `/slow` that goes on by itself.
#[derive(Debug)]
pub struct Download {
    process: Process,
    directory: TempDir,
}

impl Download {
    /// Begins it.
    pub fn start(client: &Namespace, address: IpAddr, path: &str) -> Result<Self> {
        let directory = TempDir::new()?;
        let mut command = client.command("curl");
        command.args(CURL).args(["--max-time", "180", "--dump-header"]).arg(directory.path().join("headers"));
        command.arg("--output").arg(directory.path().join("file")).arg(url(address, path));
        Ok(Self { process: Process::spawn(&mut command)?, directory })
    }

    /// Bytes that have come.
    pub fn received(&self) -> u64 {
        fs::metadata(self.directory.path().join("file")).map_or(0, |metadata| metadata.len())
    }

    /// Waits until so many bytes have come.
    pub fn wait_for_bytes(&self, bytes: u64) -> Result<()> {
        wait::until(&format!("{bytes} bytes of a download"), Duration::from_secs(60), || self.received() >= bytes)
    }

    /// The name of the server that it comes from.
    pub fn server(&self) -> Result<String> {
        wait::for_some("the headers of a download", wait::SOON, || {
            let headers = fs::read_to_string(self.directory.path().join("headers")).ok()?;
            let line = headers.lines().find_map(|line| line.strip_prefix("Server-Name: "))?;
            Some(line.trim().to_owned())
        })
    }

    /// Waits for the end and checks every byte.
    pub fn finish(mut self) -> Result<()> {
        let status = self.process.wait(Duration::from_secs(180))?;
        ensure!(status.success(), "the download ended with {status} after {} bytes", self.received());
        is_big_file(&self.directory.path().join("file"))
    }
}

/// Uploads a file of the big file's size to `/upload`.
pub fn upload(client: &Namespace, address: IpAddr) -> Result<()> {
    let directory = TempDir::new()?;
    let file = directory.path().join("big");
    write_big_file(&file)?;
    let url = url(address, "upload");
    let file = file.display().to_string();
    client
        .run("curl", CURL.into_iter().chain(["--max-time", "120", "--output", "/dev/null", "--upload-file", &file, &url]))
        .map(|_| ())
}

/// A UDP server that answers each datagram with its name.
#[derive(Debug)]
pub struct UdpServer {
    _process: Process,
}

impl UdpServer {
    /// Starts socat on one address (answers come from there) and port.
    pub fn start(namespace: &Namespace, address: IpAddr, port: u16, name: &str) -> Result<Self> {
        let kind = if address.is_ipv4() { "UDP4-RECVFROM" } else { "UDP6-RECVFROM" };
        let mut command = namespace.command("socat");
        // The shell reads the question first: socat gives up without a word if it cannot hand the question over.
        let answer = format!("SYSTEM:read question; echo {name}");
        command.arg(format!("{kind}:{port},bind={},fork,reuseaddr", host(address))).arg(answer);
        let process = Process::spawn(command.stderr(Stdio::null()))?;
        wait_for_udp_port(namespace, address, port)?;
        Ok(Self { _process: process })
    }
}

fn wait_for_udp_port(namespace: &Namespace, address: IpAddr, port: u16) -> Result<()> {
    // The file shows the sockets of the reader's namespace, through its own thread's entry.
    let file = if address.is_ipv4() { "/proc/thread-self/net/udp" } else { "/proc/thread-self/net/udp6" };
    let port = format!(":{port:04X} ");
    wait::until("a UDP server to listen", wait::SOON, || {
        namespace.enter(|| fs::read_to_string(file)).is_ok_and(|sockets| sockets.contains(&port))
    })
}

/// An FTP server, vsftpd, on all addresses: anybody may fetch `name`, which holds the server's name, and `big`
/// ([`is_big_file`]). Data connections go to its ports 10000 to 20000.
#[derive(Debug)]
pub struct FtpServer {
    _process: Process,
    _prefix: TempDir,
}

impl FtpServer {
    /// Starts it and waits until it listens.
    pub fn start(namespace: &Namespace, name: &str) -> Result<Self> {
        let prefix = TempDir::new()?;
        let (root, empty, file) = (prefix.path().join("root"), prefix.path().join("empty"), prefix.path().join("vsftpd.conf"));
        for directory in [prefix.path(), &root, &empty] {
            if directory != prefix.path() {
                fs::create_dir(directory)?;
            }
            // It refuses a root that its user may write to.
            fs::set_permissions(directory, Permissions::from_mode(0o555))?;
        }
        fs::write(root.join("name"), name)?;
        write_big_file(&root.join("big"))?;
        let configuration = format!(
            "listen_ipv6=YES\nbackground=NO\nanonymous_enable=YES\nno_anon_password=YES\nanon_root={}\nsecure_chroot_dir={}\n\
             pasv_min_port=10000\npasv_max_port=20000\nxferlog_enable=NO\n",
            root.display(),
            empty.display()
        );
        fs::write(&file, configuration)?;
        let mut command = namespace.command("vsftpd");
        let mut process = Process::spawn(command.arg(&file).stdout(Stdio::null()))?;
        wait_for_port(namespace, 21, &mut process)?;
        Ok(Self { _process: process, _prefix: prefix })
    }
}

/// A name server, dnsmasq: it knows the address of `who.test`, which is `192.0.2.` and the server's number.
#[derive(Debug)]
pub struct NameServer {
    _process: Process,
}

impl NameServer {
    /// Starts it on all addresses, and waits until it listens.
    pub fn start(namespace: &Namespace, number: u8) -> Result<Self> {
        let mut command = namespace.command("dnsmasq");
        command.args(["--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--user=root", "--no-resolv", "--no-hosts"]);
        let mut process = Process::spawn(command.arg(format!("--host-record=who.test,192.0.2.{number}")).stderr(Stdio::null()))?;
        wait_for_port(namespace, 53, &mut process)?;
        for address in [IpAddr::from([0; 4]), IpAddr::from([0; 16])] {
            wait_for_udp_port(namespace, address, 53)?;
        }
        Ok(Self { _process: process })
    }
}

/// Asks a name server who `who.test` is, and returns the [`NameServer`]'s number.
pub fn resolve(client: &Namespace, server: IpAddr) -> Result<u8> {
    let text = client.run("busybox", ["nslookup", "-type=a", "who.test", &server.to_string()])?;
    let number = text.lines().find_map(|line| line.split_once("192.0.2.")?.1.trim().parse().ok());
    number.with_context(|| format!("no address of who.test in the answer: {text}"))
}

/// Sends one datagram from a new port with socat and returns the answer without its line end.
pub fn ask_udp(client: &Namespace, address: IpAddr, port: u16) -> Result<String> {
    let kind = if address.is_ipv4() { "UDP4" } else { "UDP6" };
    let mut command = client.command("socat");
    command.args(["-T", "5", "-"]).arg(format!("{kind}:{}:{port}", host(address)));
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("start socat to send a datagram")?;
    // The input stays open until the answer is here: socat would leave half a second after its end.
    let mut input = child.stdin.take().context("the pipe was just made")?;
    input.write_all(b"who is there?\n")?;
    let mut answer = String::new();
    BufReader::new(child.stdout.take().context("the pipe was just made")?).read_line(&mut answer)?;
    drop(input);
    let _ = child.kill();
    child.wait()?;
    ensure!(!answer.is_empty(), "no answer from {address} port {port} within five seconds");
    Ok(answer.trim_end().to_owned())
}

/// An iperf3 server on its usual port, 5201.
#[derive(Debug)]
pub struct IperfServer {
    _process: Process,
}

impl IperfServer {
    /// Starts it and waits until it listens.
    pub fn start(namespace: &Namespace) -> Result<Self> {
        let mut command = namespace.command("iperf3");
        let mut process = Process::spawn(command.arg("--server").stdout(Stdio::null()).stderr(Stdio::null()))?;
        wait_for_port(namespace, 5201, &mut process)?;
        Ok(Self { _process: process })
    }
}

/// What an iperf3 run measured.
#[derive(Clone, Copy, Debug)]
pub struct Throughput {
    /// Bits in a second, at the receiver.
    pub bits_per_second: f64,
    /// Segments that were sent again.
    pub retransmits: u64,
}

/// Sends TCP for so many seconds through iperf3's own connections (control and data: two of them, so the scheduler must
/// send both to the same real server).
pub fn iperf(client: &Namespace, address: IpAddr, seconds: u32) -> Result<Throughput> {
    iperf_with(client, address, seconds, &[])
}

fn iperf_with(client: &Namespace, address: IpAddr, seconds: u32, options: &[&str]) -> Result<Throughput> {
    let (address, seconds) = (address.to_string(), seconds.to_string());
    let all = ["--client", &address, "--time", &seconds, "--json"].into_iter().chain(options.iter().copied());
    // A server takes a moment to see that whoever it served last has gone.
    let report = wait::for_some("iperf3's server to have time", wait::SOON, || {
        let text = client.run("iperf3", all.clone());
        let report =
            text.and_then(|text| serde_json::from_str::<Value>(&text).with_context(|| format!("read iperf3's report: {text}")));
        let is_busy = |report: &Value| report["error"].as_str().is_some_and(|error| error.contains("busy"));
        (!report.as_ref().is_ok_and(is_busy)).then_some(report)
    })??;
    let end = &report["end"];
    let bits_per_second = end["sum_received"]["bits_per_second"].as_f64();
    let retransmits = end["sum_sent"]["retransmits"].as_u64();
    bits_per_second
        .zip(retransmits)
        .map(|(bits_per_second, retransmits)| Throughput { bits_per_second, retransmits })
        .with_context(|| format!("iperf3 reports no sums: {report}"))
}

/// The same the other way: the server sends.
pub fn iperf_reverse(client: &Namespace, address: IpAddr, seconds: u32) -> Result<Throughput> {
    iperf_with(client, address, seconds, &["--reverse"])
}

/// A running tcpdump.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    file: PathBuf,
    _directory: TempDir,
}

impl Capture {
    /// Starts to capture what a filter lets through, and returns when tcpdump listens.
    pub fn start(namespace: &Namespace, interface: &str, filter: &str) -> Result<Self> {
        let directory = TempDir::new()?;
        let file = directory.path().join("pcap");
        let mut command = namespace.command("tcpdump");
        command.args(["-i", interface, "--immediate-mode", "-U", "-Z", "root", "-s", "0", "-w"]).arg(&file).arg(filter);
        let mut process = Process::spawn(command.stderr(Stdio::piped()))?;
        let messages = process.pipes().stderr.take().context("the pipe was just made")?;
        let mut said = String::new();
        for line in BufReader::new(messages).lines() {
            let line = line?;
            if line.contains("listening on") {
                return Ok(Self { process, file, _directory: directory });
            }
            said.push_str(&line);
        }
        bail!("tcpdump does not capture on {interface}: {said}")
    }

    /// The frames so far.
    pub fn frames(&self) -> Result<Vec<Vec<u8>>> {
        let bytes = fs::read(&self.file).with_context(|| format!("read {}", self.file.display()))?;
        parse_pcap(&bytes)
    }

    /// Waits until so many frames are there, and returns all.
    pub fn wait_for(&self, count: usize) -> Result<Vec<Vec<u8>>> {
        let what = format!("{count} captured frames");
        wait::for_some(&what, wait::SOON, || self.frames().ok().filter(|frames| frames.len() >= count))
    }

    /// Ends the capture and returns all frames, with those that tcpdump still had.
    pub fn finish(mut self) -> Result<Vec<Vec<u8>>> {
        self.process.signal(nix::sys::signal::Signal::SIGINT)?;
        self.process.wait(wait::SOON)?;
        self.frames()
    }
}

/// The frames of a capture file: a header of 24 bytes, then each frame behind 16 bytes that say when and how long.
fn parse_pcap(bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let Some((header, mut rest)) = bytes.split_at_checked(24) else { return Ok(Vec::new()) };
    ensure!(header[..4] == 0xa1b2_c3d4_u32.to_ne_bytes(), "a capture file begins with {:02x?}", &header[..4]);
    let mut frames = Vec::new();
    // tcpdump may be in the middle of a frame: that one counts next time.
    while let Some((record, after)) = rest.split_at_checked(16) {
        let length = u32::from_ne_bytes([record[8], record[9], record[10], record[11]]) as usize;
        let Some((frame, after)) = after.split_at_checked(length) else { break };
        frames.push(frame.to_vec());
        rest = after;
    }
    Ok(frames)
}
