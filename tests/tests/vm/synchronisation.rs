//! The kernel's own IPVS understands what bpfvs tells, and bpfvs what IPVS tells: Linux 6.12 in a virtual machine, with IPVS in
//! one namespace and bpfvs in another, each the master of its own connections and the backup of the other's.

use anyhow::{Result, ensure};
use bpfvs_tests::{
    bpfvs, needs_bpfvs, needs_machines,
    vm::{Machine, Version, machine::ipvs},
};

/// Clients and real servers on either side of both directors. `ours` has the addresses .200, `theirs` .201, and both know both.
///
/// TCP is masqueraded and persistent; UDP, which nobody answers, goes by direct routing.
const SCRIPT: &str = r#"
set -eEu
trap 'echo "line $LINENO failed"; cat /run/bpfvs.log | tail -20; bpfvs status; bpfvs ipvsadm -Lnc; ip netns exec theirs ipvsadm -Lnc' ERR
ip netns add switch
for bridge in inside outside; do
    ip -n switch link add $bridge type bridge
    ip -n switch link set $bridge up
done
plug() { # namespace, interface, bridge, IPv4 address, IPv6 address
    [ -e /run/netns/$1 ] || ip netns add $1
    ip netns exec $1 sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0 net.ipv4.conf.all.rp_filter=0
    ip -n $1 link add $2 type veth peer name $1-$2 netns switch
    ip -n switch link set $1-$2 master $3 up
    ip -n $1 link set lo up
    ip -n $1 link set $2 up
    ip -n $1 addr add $4/24 dev $2
    ip -n $1 addr add $5/64 dev $2 nodad
}
plug client eth0 outside 192.168.74.12 fd00:74::12
for director in ours:204:200 theirs:203:201; do
    IFS=: read name own vip <<<"$director"
    plug $name eth0 inside 10.0.0.$own fd00:10::$own
    plug $name eth1 outside 192.168.74.$own fd00:74::$own
    ip -n $name addr add 192.168.74.$vip/32 dev eth1
    ip -n $name addr add fd00:74::$vip/128 dev eth1 nodad
    ip netns exec $name sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
done
for server in rs1:205:204 rs2:206:203; do
    IFS=: read name own gateway <<<"$server"
    plug $name eth0 inside 10.0.0.$own fd00:10::$own
    ip -n $name route add default via 10.0.0.$gateway
    ip -n $name -6 route add default via fd00:10::$gateway
    mkdir -p /srv/$name
    echo $name >/srv/$name/name
    ip netns exec $name busybox httpd -p 80 -h /srv/$name
    ip netns exec $name busybox httpd -p '[::]:80' -h /srv/$name 2>/dev/null || true
done
export BPFVS_SOCKET=/run/bpfvs.sock
bpfvs serve --netns ours --state /run/state --max-connections 1024 >/run/bpfvs.out 2>/run/bpfvs.log &
for try in $(seq 1800); do grep -qx ready /run/bpfvs.out && break; sleep 0.1; done
grep -qx ready /run/bpfvs.out
theirs="ip netns exec theirs ipvsadm"
for place in 200:205 201:206; do
    vip=${place%:*} server=${place#*:}
    for pair in "192.168.74.$vip 10.0.0.$server" "[fd00:74::$vip] [fd00:10::$server]"; do
        set -- $pair
        echo "-A -t $1:80 -s rr -p 300"
        echo "-a -t $1:80 -r $2:80 -m"
        echo "-A -u $1:53 -s rr"
        echo "-a -u $1:53 -r $2:53 -g"
    done
done >/run/rules
bpfvs ipvsadm -R </run/rules
$theirs -R </run/rules
bpfvs ipvsadm --start-daemon master --mcast-interface eth0 --syncid 1
bpfvs ipvsadm --start-daemon backup --mcast-interface eth0 --syncid 2
$theirs --start-daemon master --mcast-interface eth0 --syncid 2
$theirs --start-daemon backup --mcast-interface eth0 --syncid 1
ip netns exec client bash -c '
    number=3
    for vip in 192.168.74.200 fd00:74::200 192.168.74.201 fd00:74::201; do
        eval "exec $number<>/dev/tcp/$vip/80; printf GET >&$number"
        eval "exec $((number + 4))<>/dev/udp/$vip/53"
        number=$((number + 1))
    done
    # Three packets at least, and one of them a second after another.
    until [ -e /run/go ]; do
        for udp in 7 8 9 10; do echo question >&$udp; done
        sleep 1
    done 2>/dev/null
    for tcp in 3 4 5 6; do
        printf " /name HTTP/1.0\r\n\r\n" >&$tcp
        timeout 20 cat <&$tcp | tail -n 1
    done >/run/answers' &
client=$!
entries() { # command: the connections without their times
    "$@" -Lnc | tail -n +3 | awk '{ $2 = ""; print }' | sort
}
for try in $(seq 60); do
    entries bpfvs ipvsadm >/run/ours
    entries $theirs >/run/theirs
    [ "$(grep -c -e ESTABLISHED -e UDP -e ASSURED /run/ours)" = 12 ] && cmp -s /run/ours /run/theirs && break
    sleep 1
done
diff /run/ours /run/theirs || bpfvs status
sed 's/:[0-9]* / /' /run/ours | sort
counters() {
    awk '/->.*(Masq|Route)/ { print $2, $3, $5, $6 }' | sort
}
echo bpfvs
bpfvs ipvsadm -Ln | counters
echo IPVS
$theirs -Ln | counters
# Each director gets the other's addresses, and goes on with its connections. First all go: an IPv4 address takes others of its
# net with it.
addresses() { # add or del, namespace, of its interfaces: number of the virtual address, number of the gateway
    ip -n $2 addr $1 192.168.74.$3/32 dev eth1
    ip -n $2 addr $1 10.0.0.$4/24 dev eth0
    ip -n $2 addr $1 fd00:74::$3/128 dev eth1 nodad
    ip -n $2 addr $1 fd00:10::$4/64 dev eth0 nodad
}
addresses del ours 200 204
addresses del theirs 201 203
addresses add ours 201 203
addresses add theirs 200 204
for host in client rs1 rs2; do ip -n $host neigh flush all; done
touch /run/go
wait $client
echo $(cat /run/answers)
"#;

/// What both know; what each counts (forwarding, active, inactive); and who answers at last.
const EXPECTED: &str = "\
TCP  ASSURED 192.168.74.12 192.168.74.200:80 10.0.0.205:80
TCP  ASSURED 192.168.74.12 192.168.74.201:80 10.0.0.206:80
TCP  ASSURED [fd00:74::12] [fd00:74::200]:80 [fd00:10::205]:80
TCP  ASSURED [fd00:74::12] [fd00:74::201]:80 [fd00:10::206]:80
TCP  ESTABLISHED 192.168.74.12 192.168.74.200:80 10.0.0.205:80
TCP  ESTABLISHED 192.168.74.12 192.168.74.201:80 10.0.0.206:80
TCP  ESTABLISHED [fd00:74::12] [fd00:74::200]:80 [fd00:10::205]:80
TCP  ESTABLISHED [fd00:74::12] [fd00:74::201]:80 [fd00:10::206]:80
UDP  UDP 192.168.74.12 192.168.74.200:53 10.0.0.205:53
UDP  UDP 192.168.74.12 192.168.74.201:53 10.0.0.206:53
UDP  UDP [fd00:74::12] [fd00:74::200]:53 [fd00:10::205]:53
UDP  UDP [fd00:74::12] [fd00:74::201]:53 [fd00:10::206]:53
bpfvs
10.0.0.205:53 Route 0 1
10.0.0.205:80 Masq 1 0
10.0.0.206:53 Route 0 1
10.0.0.206:80 Masq 1 0
[fd00:10::205]:53 Route 0 1
[fd00:10::205]:80 Masq 1 0
[fd00:10::206]:53 Route 0 1
[fd00:10::206]:80 Masq 1 0
IPVS
10.0.0.205:53 Route 0 1
10.0.0.205:80 Masq 1 0
10.0.0.206:53 Route 0 1
10.0.0.206:80 Masq 1 0
[fd00:10::205]:53 Route 0 1
[fd00:10::205]:80 Masq 1 0
[fd00:10::206]:53 Route 0 1
[fd00:10::206]:80 Masq 1 0
rs1 rs1 rs2 rs2
";

#[test]
fn the_kernels_ipvs_and_bpfvs_tell_each_other() -> Result<()> {
    needs_machines!([Version::V6_12]);
    needs_bpfvs!();
    let machine = Machine::new(Version::V6_12)?.modules(ipvs(Version::V6_12)).add(&bpfvs::binary()?, "/usr/local/bin/bpfvs")?;
    let outcome = machine.run(SCRIPT)?;
    ensure!(outcome.status == 0 && outcome.output == EXPECTED, "status {}:\n{}", outcome.status, outcome.output);
    Ok(())
}
