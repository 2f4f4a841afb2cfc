// Checks a proof of tokentape with nothing of tokentape: C2SP notes by golang.org/x/mod, RFC 9162 trees by
// transparency-dev/merkle. Written from docs/ledger.md alone, as an auditor would.
//
//	verify PUBLIC_KEY_FILE PROOF_FILE
package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/note"
)

type document struct {
	Rotations  []entry  `json:"rotations"`
	Format     string   `json:"format"`
	Event      event    `json:"event"`
	Segment    segment  `json:"segment"`
	Entry      entry    `json:"entry"`
	Checkpoint string   `json:"checkpoint"`
	Old        string   `json:"old"`
	New        string   `json:"new"`
	Path       [][]byte `json:"path"`
}

type event struct {
	ID         string `json:"id"`
	Metadata   []byte `json:"metadata"`
	Content    []byte `json:"content"`
	Salt       []byte `json:"salt"`
	Commitment []byte `json:"commitment"`
	Schema     string `json:"schema"`
}

type segment struct {
	Key  string   `json:"key"`
	Rows uint64   `json:"rows"`
	Row  uint64   `json:"row"`
	Path [][]byte `json:"path"`
}

type entry struct {
	Number uint64   `json:"number"`
	JSON   string   `json:"json"`
	Path   [][]byte `json:"path"`
}

// What an entry says of segments and schemas; all else in it is covered by its leaf hash.
type committed struct {
	Body struct {
		Segments []struct {
			Key  string `json:"key"`
			Rows uint64 `json:"rows"`
			Root string `json:"root"`
		} `json:"segments"`
		Objects []struct {
			Key    string `json:"key"`
			SHA256 string `json:"sha256"`
		} `json:"objects"`
	} `json:"body"`
}

// What an entry says of itself and, where it hands over, of the key that follows.
type signed struct {
	Sequence  uint64 `json:"sequence"`
	Type      string `json:"type"`
	KeyID     string `json:"key_id"`
	Origin    string `json:"origin"`
	Signature []byte `json:"signature"`
	Body      struct {
		Key string `json:"key"`
	} `json:"body"`
}

type treeHead struct {
	size uint64
	root []byte
}

// turn is a key that signs what comes after an entry; the first key's turn comes after entry -1.
type turn struct {
	after int64
	key   note.Verifier
}

// keyChain holds the keys that were handed to us, the first one first, and the turns of those that the proof leads to.
type keyChain struct {
	trusted []note.Verifier
	turns   []turn
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: verify PUBLIC_KEY_FILE PROOF_FILE")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "refused:", err)
		os.Exit(1)
	}
	fmt.Println("good")
}

func run(keyFile, proofFile string) error {
	key, err := os.ReadFile(keyFile)
	if err != nil {
		return err
	}
	chain, err := newChain(string(key))
	if err != nil {
		return err
	}
	data, err := os.ReadFile(proofFile)
	if err != nil {
		return err
	}
	var doc document
	if err := json.Unmarshal(data, &doc); err != nil {
		return err
	}
	switch doc.Format {
	case "tokentape-event-proof/1":
		return checkEvent(doc, chain)
	case "tokentape-consistency-proof/1":
		return checkConsistency(doc, chain)
	}
	return fmt.Errorf("unknown format %q", doc.Format)
}

func newChain(lines string) (*keyChain, error) {
	chain := &keyChain{}
	for _, line := range strings.Fields(lines) {
		verifier, err := note.NewVerifier(line)
		if err != nil {
			return nil, err
		}
		chain.trusted = append(chain.trusted, verifier)
	}
	if len(chain.trusted) == 0 {
		return nil, errors.New("no public key")
	}
	chain.turns = []turn{{-1, chain.trusted[0]}}
	return chain, nil
}

// at is the key in force once number entries stand.
func (chain *keyChain) at(number uint64) note.Verifier {
	found := chain.turns[0].key
	for _, turn := range chain.turns {
		if turn.after < int64(number) {
			found = turn.key
		}
	}
	return found
}

// follow checks the entries that hand over to another key: each signed by the key in force, or by a fresh one that we trust.
func (chain *keyChain) follow(rotations []entry, checkpoint string) error {
	for _, item := range rotations {
		var said signed
		if err := json.Unmarshal([]byte(item.JSON), &said); err != nil {
			return err
		}
		next, err := note.NewVerifier(said.Body.Key)
		if err != nil {
			return err
		}
		last := chain.turns[len(chain.turns)-1]
		if said.Sequence != item.Number || int64(item.Number) <= last.after || next.Name() != last.key.Name() {
			return fmt.Errorf("rotation %d cannot follow", item.Number)
		}
		by := last.key
		switch said.Type {
		case "key_rotated":
		case "key_lost":
			by = nil
			for _, trusted := range chain.trusted[1:] {
				if trusted.Name() == next.Name() && trusted.KeyHash() == next.KeyHash() {
					by = trusted
				}
			}
		default:
			by = nil
		}
		if by == nil || !bySigned(item, said, by) {
			return fmt.Errorf("rotation %d is not signed by the key in force", item.Number)
		}
		chain.turns = append(chain.turns, turn{int64(item.Number), next})
	}
	head, err := open(checkpoint, chain)
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	for _, item := range rotations {
		leaf := rfc6962.DefaultHasher.HashLeaf([]byte(item.JSON))
		if err := proof.VerifyInclusion(rfc6962.DefaultHasher, item.Number, head.size, leaf, item.Path, head.root); err != nil {
			return fmt.Errorf("rotation %d: %w", item.Number, err)
		}
	}
	return nil
}

// bySigned checks the signature over an entry's bytes without the field signature, the last one but type.
func bySigned(item entry, said signed, key note.Verifier) bool {
	const field = `,"signature":"`
	at := strings.LastIndex(item.JSON, field)
	if at < 0 || said.Origin != key.Name() || said.KeyID != fmt.Sprintf("%s+%08x", key.Name(), key.KeyHash()) {
		return false
	}
	rest := item.JSON[at+len(field):]
	return key.Verify([]byte(item.JSON[:at]+rest[strings.Index(rest, `"`)+1:]), said.Signature)
}

func checkEvent(doc document, chain *keyChain) error {
	if err := chain.follow(doc.Rotations, doc.Checkpoint); err != nil {
		return err
	}
	head, err := open(doc.Checkpoint, chain)
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	leaf := rfc6962.DefaultHasher.HashLeaf([]byte(doc.Entry.JSON))
	err = proof.VerifyInclusion(rfc6962.DefaultHasher, doc.Entry.Number, head.size, leaf, doc.Entry.Path, head.root)
	if err != nil {
		return fmt.Errorf("entry: %w", err)
	}
	var said committed
	if err := json.Unmarshal([]byte(doc.Entry.JSON), &said); err != nil {
		return err
	}
	root, err := segmentRoot(said, doc.Segment)
	if err != nil {
		return err
	}
	row, err := leafOf(doc.Event)
	if err != nil {
		return err
	}
	if err := checkSchema(said, doc.Event); err != nil {
		return err
	}
	err = proof.VerifyInclusion(rfc6962.DefaultHasher, doc.Segment.Row, doc.Segment.Rows, row, doc.Segment.Path, root)
	if err != nil {
		return fmt.Errorf("event: %w", err)
	}
	return nil
}

func checkConsistency(doc document, chain *keyChain) error {
	if err := chain.follow(doc.Rotations, doc.New); err != nil {
		return err
	}
	before, err := open(doc.Old, chain)
	if err != nil {
		return fmt.Errorf("old checkpoint: %w", err)
	}
	after, err := open(doc.New, chain)
	if err != nil {
		return fmt.Errorf("new checkpoint: %w", err)
	}
	return proof.VerifyConsistency(rfc6962.DefaultHasher, before.size, after.size, doc.Path, before.root, after.root)
}

// open checks the signature of a checkpoint by the key in force at its size, and reads its tree head: origin, size, root, then
// extension lines.
func open(text string, chain *keyChain) (treeHead, error) {
	claimed := uint64(0)
	if lines := strings.SplitN(text, "\n", 3); len(lines) == 3 {
		claimed, _ = strconv.ParseUint(lines[1], 10, 63)
	}
	verifier := chain.at(claimed)
	opened, err := note.Open([]byte(text), note.VerifierList(verifier))
	if err != nil {
		return treeHead{}, err
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) < 4 || lines[0] != verifier.Name() {
		return treeHead{}, errors.New("not a checkpoint of this ledger")
	}
	size, err := strconv.ParseUint(lines[1], 10, 64)
	if err != nil {
		return treeHead{}, err
	}
	root, err := base64.StdEncoding.DecodeString(lines[2])
	return treeHead{size, root}, err
}

func segmentRoot(said committed, wanted segment) ([]byte, error) {
	for _, item := range said.Body.Segments {
		if item.Key == wanted.Key && item.Rows == wanted.Rows {
			return hex.DecodeString(item.Root)
		}
	}
	return nil, fmt.Errorf("the entry commits no segment %s of %d rows", wanted.Key, wanted.Rows)
}

// checkSchema holds the schema that reads the event's bytes against the entry, by the fingerprint in those bytes.
func checkSchema(said committed, event event) error {
	key := "schemas/" + hex.EncodeToString(event.Metadata[2:10]) + ".avsc"
	sum := sha256.Sum256([]byte(event.Schema))
	for _, item := range said.Body.Objects {
		if item.Key == key && item.SHA256 == hex.EncodeToString(sum[:]) {
			return nil
		}
	}
	return errors.New("the entry names another schema")
}

// leafOf is SHA-256(0x00 || metadata || C): C is the HMAC of the content under the salt, or what took its place.
func leafOf(event event) ([]byte, error) {
	id, err := hex.DecodeString(event.ID)
	if err != nil || len(event.Metadata) < 26 || !bytes.Equal(event.Metadata[10:26], id) {
		return nil, errors.New("the event's bytes carry another id")
	}
	if (event.Content == nil) != (event.Salt == nil) || (event.Content != nil && event.Commitment != nil) {
		return nil, errors.New("content and salt stand together, and without a commitment")
	}
	committed := make([]byte, sha256.Size)
	switch {
	case event.Content != nil:
		mac := hmac.New(sha256.New, event.Salt)
		mac.Write(event.Content)
		committed = mac.Sum(nil)
	case event.Commitment != nil:
		committed = event.Commitment
	}
	return rfc6962.DefaultHasher.HashLeaf(append(event.Metadata, committed...)), nil
}
