//! The client's address behind FULLNAT: unmodified programs on a real server see the client that the TCP option names.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::{IpAddr, SocketAddr},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bpfvs::{self, Bpfvs},
    caller::Caller,
    control_group::ControlGroup,
    lab::{Family, Lab, Layout, Offloads},
    needs, needs_bpfvs, needs_control_groups,
    netns::{self, Namespace, Process},
    programs::{host, upload, url},
    wait,
};
use serde_json::Value;
use tempfile::TempDir;

/// Where the segments come from, as if a director had sent them.
const DIRECTORS: [&str; 2] = ["10.9.0.9", "fd09::9"];
/// Where they go.
const SERVERS: [&str; 2] = ["10.9.0.1", "fd09::1"];
/// Who sends them in truth.
const CLIENTS: [&str; 2] = ["192.0.2.7:4321", "[2001:db8::7]:4321"];

/// The option that names a client.
fn option(client: SocketAddr) -> Vec<u8> {
    let address = match client.ip() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    [&[254, 4 + address.len() as u8], &client.port().to_be_bytes()[..], &address].concat()
}

/// A real server with a control group, and a place to send segments from.
struct Setup {
    outside: Namespace,
    server: Namespace,
    group: ControlGroup,
    /// The next port that segments come from.
    port: u16,
}

impl Setup {
    fn new() -> Result<Self> {
        let (outside, server) = (Namespace::new("outside")?, Namespace::new("server")?);
        outside.connect("eth0", &server, "eth0")?;
        let mac = outside.mac("eth0")?.map(|byte| format!("{byte:02x}")).join(":");
        for (address, director, length) in [(SERVERS[0], DIRECTORS[0], 24), (SERVERS[1], DIRECTORS[1], 64)] {
            server
                .ip(&format!("addr add {address}/{length} dev eth0\nneigh add {director} lladdr {mac} dev eth0 nud permanent"))?;
        }
        Ok(Self { outside, server, group: ControlGroup::new()?, port: 1000 })
    }

    /// `bpfvs realserver toa` for the control group.
    fn toa(&self, words: &str) -> Result<String> {
        toa(&self.group, &words.split_whitespace().collect::<Vec<_>>())
    }

    /// What the status says about the control group, if it is on.
    fn status(&self) -> Result<Option<Value>> {
        let output = Command::new(bpfvs::binary()?).args(["realserver", "toa", "status", "--json"]).output()?;
        let report: Value = serde_json::from_slice(&output.stdout)?;
        let path = self.group.path().to_str();
        Ok(report["toa"].as_array().into_iter().flatten().find(|watched| watched["cgroup"].as_str() == path).cloned())
    }

    fn count(&self, what: &str) -> Result<u64> {
        let status = self.status()?.context("it is on")?;
        status[what].as_u64().with_context(|| format!("no {what} in {status}"))
    }

    /// A connection from a port that was not used before: the server has answered, and waits for what completes it.
    fn dial(&mut self, family: usize, port: u16) -> Result<(SocketAddr, Caller)> {
        self.port += 1;
        let source = SocketAddr::new(DIRECTORS[family].parse()?, self.port);
        let caller = Caller::dial(&self.outside, &self.server, source, SocketAddr::new(SERVERS[family].parse()?, port))?;
        Ok((source, caller))
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        off(&self.group);
    }
}

/// `bpfvs realserver toa` for a control group.
fn toa(group: &ControlGroup, words: &[&str]) -> Result<String> {
    netns::run(Command::new(bpfvs::binary()?).args(["realserver", "toa"]).args(words).arg("--cgroup").arg(group.path()))
}

/// What is pinned does not go away with namespaces and processes.
fn off(group: &ControlGroup) {
    if let Err(error) = toa(group, &["off"]) {
        eprintln!("the programs of {} stay behind: {error:#}", group.path().display());
    }
}

/// `toa on`, until it is dropped.
struct Switch<'a>(&'a ControlGroup);

impl<'a> Switch<'a> {
    fn on(group: &'a ControlGroup, words: &[&str]) -> Result<Self> {
        toa(group, &[&["on"], words].concat())?;
        Ok(Self(group))
    }
}

impl Drop for Switch<'_> {
    fn drop(&mut self) {
        off(self.0);
    }
}

/// nginx on port 80, for each family a socket of its own, and on 8080 with one for both. `PUT` to `/upload` takes anything.
struct Nginx {
    _process: Process,
    directory: TempDir,
}

impl Nginx {
    fn start(group: &ControlGroup, server: &Namespace) -> Result<Self> {
        let directory = TempDir::new()?;
        let place = directory.path().display();
        let temporary =
            ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|name| format!("{name}_temp_path {place}/{name};"));
        let configuration = format!(
            "daemon off; master_process off; user root; pid {place}/pid; error_log stderr crit; events {{}}
             http {{
                 log_format peers '$remote_addr $remote_port';
                 access_log {place}/log peers;
                 client_max_body_size 0;
                 {}
                 server {{
                     listen 80; listen [::]:80 ipv6only=on; listen [::]:8080 ipv6only=off;
                     location / {{ return 200 hello; }}
                     location = /upload {{
                         proxy_method GET; proxy_pass_request_body off; proxy_set_header Content-Length \"\";
                         proxy_pass http://127.0.0.1:81/;
                     }}
                 }}
                 server {{ listen 127.0.0.1:81; access_log off; location / {{ return 200 taken; }} }}
             }}",
            temporary.concat()
        );
        let file = directory.path().join("nginx.conf");
        fs::write(&file, configuration)?;
        let mut command = group.command(server, "nginx");
        command.arg("-p").arg(directory.path()).arg("-c").arg(&file).args(["-e", "stderr"]);
        let mut process = Process::spawn(&mut command)?;
        let pid = directory.path().join("pid");
        wait::until("nginx to listen", wait::SOON, || pid.exists() || process.ended().is_ok_and(|ended| ended.is_some()))?;
        ensure!(process.ended()?.is_none(), "nginx ended at once");
        Ok(Self { _process: process, directory })
    }

    /// The lines of the access log: address and port of who asked.
    fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Asks for a page by a connection that is completed with these options, and returns who asked, says nginx's access log.
    fn visitor(&self, setup: &mut Setup, family: usize, port: u16, options: &[u8]) -> Result<(String, SocketAddr)> {
        let before = self.log().len();
        let (source, mut caller) = setup.dial(family, port)?;
        caller.say(options, b"")?;
        caller.say(&[], b"GET / HTTP/1.0\r\n\r\n")?;
        let line = wait::for_some("a line in nginx's log", wait::SOON, || self.log().get(before).cloned())?;
        Ok((line, source))
    }
}

#[test]
fn nginx_logs_the_client() -> Result<()> {
    needs!(root, "nginx");
    needs_bpfvs!();
    needs_control_groups!();
    let mut setup = Setup::new()?;
    // It listens before anything is switched on: nothing has to be started again.
    let nginx = Nginx::start(&setup.group, &setup.server)?;
    let logged = |address: IpAddr, port: u16| format!("{address} {port}");
    let show = |nginx: &Nginx, setup: &mut Setup, expected_client: bool| -> Result<()> {
        for (family, client) in CLIENTS.iter().enumerate() {
            let client: SocketAddr = client.parse()?;
            let (line, source) = nginx.visitor(setup, family, 80, &option(client))?;
            let expected = if expected_client { client } else { source };
            ensure!(line == logged(expected.ip(), expected.port()), "nginx says {line}, and it was {expected}");
        }
        Ok(())
    };
    show(&nginx, &mut setup, false).context("not switched on yet")?;

    setup.toa("on --from 10.9.0.0/24 --from fd09::9")?;
    show(&nginx, &mut setup, true).context("switched on")?;
    for (family, port, client, shown) in [
        // One socket for both families shows IPv4 as it always does, and can show IPv6 clients behind an IPv4 director.
        (0, 8080, CLIENTS[0], "::ffff:192.0.2.7 4321"),
        (1, 8080, CLIENTS[1], "2001:db8::7 4321"),
        (0, 8080, CLIENTS[1], "2001:db8::7 4321"),
        (1, 80, CLIENTS[0], "::ffff:192.0.2.7 4321"),
    ] {
        let (line, _) = nginx.visitor(&mut setup, family, port, &option(client.parse()?))?;
        ensure!(line == shown, "family {family}, port {port}: nginx says {line} and not {shown}");
    }
    // Behind other options; the first of its kind counts.
    let options = [&[1, 1, 1, 1][..], &option(CLIENTS[0].parse()?), &option("192.0.2.66:66".parse()?)].concat();
    let (line, _) = nginx.visitor(&mut setup, 0, 80, &options)?;
    ensure!(line == "192.0.2.7 4321", "nginx says {line}");
    let (line, source) = nginx.visitor(&mut setup, 0, 80, &[])?;
    ensure!(line == logged(source.ip(), source.port()), "without the option nginx says {line}");
    ensure!((setup.count("shown")?, setup.count("untrusted")?) == (7, 0), "{:?}", setup.status()?);

    setup.toa("on --from 10.9.0.8 --from fd08::/16")?;
    show(&nginx, &mut setup, false).context("from somebody else")?;
    ensure!((setup.count("shown")?, setup.count("untrusted")?) == (7, 2), "{:?}", setup.status()?);
    let said = setup.toa("on")?;
    ensure!(said.contains("can claim any address"), "nobody was warned: {said}");
    show(&nginx, &mut setup, true).context("from everybody")?;

    setup.toa("off")?;
    ensure!(setup.status()?.is_none(), "it is still on");
    show(&nginx, &mut setup, false).context("switched off")
}

/// A server on IPv4 that says who calls: at `accept`, at once, and after it has read something. Each word that comes in is
/// an occasion to ask again.
const PROGRAM: &str = r#"
import socket
server = socket.create_server(("0.0.0.0", 7000))
print("ready", flush=True)
while True:
    connection, peer = server.accept()
    print("accept", *peer, flush=True)
    while connection.recv(100):
        print("getpeername", *connection.getpeername(), flush=True)
"#;

#[test]
fn accept_and_getpeername() -> Result<()> {
    needs!(root, "python3");
    needs_bpfvs!();
    needs_control_groups!();
    let mut setup = Setup::new()?;
    setup.toa("on --from 10.9.0.9")?;
    let client: SocketAddr = CLIENTS[0].parse()?;
    let mut command = setup.group.command(&setup.server, "python3");
    let mut program = Process::spawn(command.args(["-c", PROGRAM]).stdout(Stdio::piped()))?;
    let output = program.pipes().stdout.take().context("the pipe was just made")?;
    let (say, said) = mpsc::channel();
    thread::spawn(move || BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| say.send(line)));
    let expect = |line: String| -> Result<()> {
        let found = said.recv_timeout(wait::SOON).context("the program says nothing")?;
        ensure!(found == line, "the program says {found:?} and not {line:?}");
        Ok(())
    };
    let line = |call: &str, peer: SocketAddr| format!("{call} {} {}", peer.ip(), peer.port());
    expect("ready".to_owned())?;

    let (_, mut caller) = setup.dial(0, 7000)?;
    caller.say(&option(client), b"")?;
    expect(line("accept", client))?;
    // What comes later changes nothing.
    caller.say(&option("192.0.2.66:66".parse()?), b"hello")?;
    expect(line("getpeername", client))?;
    caller.close()?;

    // The segment that completes the connection has data, as with TCP_DEFER_ACCEPT.
    let (_, mut caller) = setup.dial(0, 7000)?;
    caller.say(&option(client), b"hello")?;
    expect(line("accept", client))?;
    expect(line("getpeername", client))?;
    caller.close()?;

    // It was not in the segment that completed the connection, but in the first that had data.
    let (source, mut caller) = setup.dial(0, 7000)?;
    caller.say(&[], b"")?;
    expect(line("accept", source))?;
    caller.say(&option(client), b"hello")?;
    expect(line("getpeername", client))?;
    caller.close()?;

    // After the first data it is too late: only a client can have said that.
    let (source, mut caller) = setup.dial(0, 7000)?;
    caller.say(&[], b"")?;
    expect(line("accept", source))?;
    caller.say(&[], b"hello")?;
    expect(line("getpeername", source))?;
    caller.say(&option(client), b"hello")?;
    expect(line("getpeername", source))?;
    caller.close()?;

    // There is no room for such an address in what an IPv4 socket answers.
    ensure!(setup.count("unshowable")? == 0, "{:?}", setup.status()?);
    let (source, mut caller) = setup.dial(0, 7000)?;
    caller.say(&option(CLIENTS[1].parse()?), b"")?;
    expect(line("accept", source))?;
    ensure!(setup.count("unshowable")? == 1, "{:?}", setup.status()?);
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    needs!(root);
    needs_bpfvs!();
    let refused = |words: &[&str]| -> Result<String> {
        let output = Command::new(bpfvs::binary()?).args(["realserver", "toa"]).args(words).output()?;
        ensure!(!output.status.success(), "{words:?} was not refused");
        Ok(String::from_utf8(output.stderr)?)
    };
    for (words, parts) in [
        (["on", "--cgroup", "/proc"], ["/proc", "not in the file system cgroup2", "name a directory"]),
        (["off", "--cgroup", "/no/such/group"], ["/no/such/group", "No such file", "name a directory"]),
        (["on", "--from", "director"], ["director", "neither an address nor a network", "write 10.0.0.204"]),
    ] {
        let said = refused(&words)?;
        ensure!(parts.iter().all(|part| said.contains(part)), "{words:?}: {said}");
    }
    Ok(())
}

/// The whole way: clients, a director with FULLNAT, and two nginx that know nothing of it.
fn through_a_director(hook: &str, offloads: &[Offloads]) -> Result<()> {
    let lab = Lab::new(Layout::Masquerade, 2)?;
    let _pass = if hook == "xdp" { Some(lab.prepare_for_xdp()?) } else { None };
    let locals = ["10.0.0.230", "fd00:10::1:230"];
    lab.director.ip(&format!("addr add {}/32 dev eth0\naddr add {}/128 dev eth0 nodad", locals[0], locals[1]))?;
    let group = ControlGroup::new()?;
    let _switch = Switch::on(&group, &["--from", locals[0], "--from", locals[1]])?;
    let nginx = lab.servers.iter().map(|server| Nginx::start(&group, server)).collect::<Result<Vec<_>>>()?;
    let bpfvs = Bpfvs::start(&lab.director, &["--hook", hook])?;
    bpfvs.succeed(&["localaddr", "add", &locals.join(",")])?;
    for family in Family::ALL {
        let vip = host(lab.vip.of(family));
        bpfvs.ipvsadm(&format!("-A -t {vip}:80 -s rr"))?;
        for address in &lab.server_addresses {
            bpfvs.ipvsadm(&format!("-a -t {vip}:80 -r {}:80 -m --fullnat --toa", host(address.of(family))))?;
        }
    }
    bpfvs.wait_for_servers()?;
    let mut visits = Visits { lab: &lab, nginx: &nginx, expected: Vec::new() };
    for offloads in offloads {
        lab.set_offloads(*offloads)?;
        for family in Family::ALL {
            visits.pay(family).with_context(|| format!("{family:?}, offloads {offloads:?}"))?;
        }
    }
    ensure!(bpfvs.reason("unnamed")? == 0, "segments were dropped that had no room for the option");
    Ok(())
}

/// Requests of a client, and what the logs of the real servers have to say.
struct Visits<'a> {
    lab: &'a Lab,
    nginx: &'a [Nginx],
    expected: Vec<String>,
}

impl Visits<'_> {
    fn pay(&mut self, family: Family) -> Result<()> {
        let (lab, client) = (self.lab, self.lab.client_address.of(family));
        let page = url(lab.vip.of(family), "");
        // Two requests by one connection each: the second comes when the connection has settled.
        for _ in 0..4 {
            let said = lab.client.run("curl", ["-s", "-f", "-g", "-m", "10", "-w", " %{local_port}\n", &page, &page])?;
            let said: Vec<_> = said.lines().collect();
            ensure!(said.len() == 2 && said[0] == said[1], "curl says {said:?}, and not twice the same port");
            let port = said[0].strip_prefix("hello ").with_context(|| format!("curl says {said:?}"))?;
            self.expected.extend([format!("{client} {port}"), format!("{client} {port}")]);
        }
        // Full-sized segments, also before the first answer.
        upload(&lab.client, lab.vip.of(family)).context("upload")?;
        let mut lines = Vec::new();
        wait::until("every line of both logs", wait::SOON, || {
            lines = self.nginx.iter().flat_map(Nginx::log).collect();
            lines.len() == self.expected.len() + 1
        })
        .with_context(|| format!("the logs say {lines:?}"))?;
        let uploaded = lines.iter().find(|line| !self.expected.contains(line)).context("an upload has a port of its own")?;
        ensure!(uploaded.starts_with(&format!("{client} ")), "{uploaded} has uploaded");
        self.expected.push(uploaded.clone());
        lines.sort();
        self.expected.sort();
        ensure!(lines == self.expected, "the logs say {lines:?}, and it was {:?}", self.expected);
        Ok(())
    }
}

#[test]
fn through_a_director_by_tc() -> Result<()> {
    needs!(root, "nginx", "curl", "ethtool");
    needs_bpfvs!();
    needs_control_groups!();
    through_a_director("auto", &[Offloads::On, Offloads::Off])
}

#[test]
fn through_a_director_by_xdp() -> Result<()> {
    needs!(root, "nginx", "curl", "ethtool");
    needs_bpfvs!();
    needs_control_groups!();
    through_a_director("xdp", &[Offloads::Off])
}
